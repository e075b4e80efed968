"""Kernels as operators see them: a source file, a function in it, template parameters; and launching them.

    _SOURCE = Path(__file__).with_name("cuda.cu")
    _ADD = Kernel(_SOURCE, "add", T=DType.bfloat16)
    launch(_ADD, grid, 256, x, y, out, rows, width)

The types of the arguments are read off the function's signature in the source.
"""
