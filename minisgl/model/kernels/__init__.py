"""The kernels of the GPU worker, in Triton: few, each with the bytes it moves.  Triton's interpreter runs them on a CPU.

Triton compiles a kernel again for every combination of arguments that are 1, or divisible by 16, or neither.  Arguments that
change from step to step (numbers of rows, addresses inside a packed buffer) are exempt (`do_not_specialize`), or a server would
compile in the middle of serving; a test reads the names.
"""
