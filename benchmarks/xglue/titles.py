"""Names of the methods in tables."""

from .methods import METHODS

MISSING = "–"

# In the tables' order: the rows of the paper's tables first.
TITLES = {name: method.title for name, method in METHODS.items()}
