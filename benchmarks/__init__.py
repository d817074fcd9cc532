"""Measurements, their results, tables and figures. Each is run as a module: `python -m benchmarks.cpu.step`."""
