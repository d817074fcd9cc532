"""Counts what a piece of work costs: calls of our code, bytes that torch allocates. No clock."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def calls_of(work: Callable[[], Any]) -> int:
    """The number of calls that code of the package makes or is made with, torch's own work left out."""
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and frame.f_globals.get("__name__", "").startswith("graddrop_kernels"):
            calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in known:
                self.bytes += each.untyped_storage().nbytes()
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def allocated_by(work: Callable[[], Any]) -> int:
    """The bytes of all tensors that are made, freed ones included."""
    with _Allocations() as allocations:
        work()
    return allocations.bytes
