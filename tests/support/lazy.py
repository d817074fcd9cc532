"""Modules that take seconds to import, and only some tests need: collecting the suite does not."""

import importlib


class Lazy:
    """Stands for a module, which is imported when the first of its names is asked for."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str):
        if name.startswith("_"):  # what pytest and pickle ask any object for
            raise AttributeError(name)
        return getattr(importlib.import_module(self._module), name)


transformers = Lazy("transformers")
integration = Lazy("graddrop_kernels.integrations.transformers")
