"""An NVIDIA GPU's side of the worker: layers on the kernels of minisgl.model.kernels, attention, graphs, the runner."""
