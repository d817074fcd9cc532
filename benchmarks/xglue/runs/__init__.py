"""Training runs: one, sweeps of many, and the studies that files describe."""
