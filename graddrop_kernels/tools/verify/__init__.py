"""python -m graddrop_kernels verify: every backend against the reference."""
