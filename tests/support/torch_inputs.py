"""PyTorch's own test inputs for its AdamW (torch.testing._internal.common_optimizers)."""

import sys
from unittest import mock

import torch

# These take seconds to import. The optimizers' module has only marks from them, by which torch leaves out tests.
_MARKS = ("common_methods_invocations", "common_device_type")
with mock.patch.dict(sys.modules, {f"torch.testing._internal.{name}": mock.MagicMock() for name in _MARKS}):
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        _get_optim_inputs_including_global_cliquey_kwargs,
        optim_db,
    )

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
all_inputs = _get_optim_inputs_including_global_cliquey_kwargs
__all__ = ["INFO", "OptimizerErrorEnum", "all_inputs", "optim_db"]
