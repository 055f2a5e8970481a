"""The kernels of the GPU worker, in Triton: few, each with the bytes it moves.  Triton's interpreter runs them on a CPU.

Triton compiles a kernel anew for every combination of arguments that are 1, or divisible by 16, or not.  What changes from step
to step (numbers of rows, addresses inside a packed buffer) is exempt from that, or a server would compile for hours after its
start; a test counts.
"""
