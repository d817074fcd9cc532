"""Both GPU backends on CPU tensors: their own functions, tables and launches, with the PTX of their kernels run by
tests/support/ptx.
"""
