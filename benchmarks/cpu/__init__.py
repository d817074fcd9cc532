"""Measurements on the CPU, one module each: `python -m benchmarks.cpu.step`."""
