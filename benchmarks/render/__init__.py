"""Results -> tables and figures: `python -m benchmarks.render`, `python -m benchmarks.render.figures`."""
