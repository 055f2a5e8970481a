"""The worker's side of an NVIDIA GPU: layers on the kernels of minisgl.model.kernels, attention backends, graphs, the runner."""
