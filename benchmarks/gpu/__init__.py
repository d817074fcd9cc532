"""Measurements on a GPU, one module each; all of them: `python -m benchmarks.gpu`."""
