"""The bytes that an optimizer keeps alive."""

import ctypes
import gc
from collections.abc import Iterable

import numpy as np
import torch


def kept_bytes(optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Returns (bytes of tensors, bytes of tables) that only the optimizer keeps alive: no parameters or gradients."""
    tensors = [tensor for param in params for tensor in (param, param.grad) if tensor is not None]
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    found: dict[int, int] = {}
    tables = 0
    seen, queue = set(), [optimizer]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in given:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (np.ndarray, ctypes.Array, ctypes.Structure)):
            tables += memoryview(item).nbytes
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += item
        elif isinstance(item, torch.optim.Optimizer) or type(item).__module__.startswith("graddrop_kernels"):
            queue += [value for value in gc.get_referents(item) if not isinstance(value, type)]
    return sum(found.values()), tables
