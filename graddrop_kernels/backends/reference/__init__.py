"""The reference backend: the meaning of a step, in plain PyTorch."""
