"""The GradDrop paper's experiments, as commands: `python -m benchmarks.xglue`."""
