"""Imports modules that take seconds and that only some tests need when these run, so that collecting the suite does
not.
"""

import importlib


class Lazy:
    """Stands for a module, which is imported when the first of its names is asked for."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str):
        if name.startswith("_"):  # pytest and pickle ask any object for such names
            raise AttributeError(name)
        return getattr(importlib.import_module(self._module), name)


transformers = Lazy("transformers")
integration = Lazy("graddrop_kernels.integrations.transformers")
seqeval, sklearn = Lazy("seqeval.metrics"), Lazy("sklearn.metrics")
scipy_stats = Lazy("scipy.stats")
