"""The kernels of the GPU worker, in Triton: few, each in one file with the bytes it moves.  Also run by Triton's interpreter."""
