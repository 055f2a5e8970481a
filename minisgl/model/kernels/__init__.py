"""The kernels of the GPU worker, in Triton: few, each with the bytes it moves.  Triton's interpreter runs them on a CPU."""
