"""How methods are called in tables."""

from graddrop_kernels.demo.methods import METHODS

MISSING = "–"

# In their order: the rows of the paper's tables first.
TITLES = {name: method.title for name, method in METHODS.items()}
