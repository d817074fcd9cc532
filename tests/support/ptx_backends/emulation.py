"""Emulation: a backend's own functions on CPU tensors, with its kernels' PTX run on the CPU in place of launches."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from unittest import mock

import torch
from ptx.kernel import Kernel

from graddrop_kernels import backends
from graddrop_kernels.backends.batch import TensorBatch
from graddrop_kernels.backends.tensor_table import tensor_table
from graddrop_kernels.masks.bitmask import num_planes, num_words


class Emulation:
    """``change``: makes another text of a PTX text, to plant a fault."""

    def __init__(self, name: str, implementation: ModuleType, seed: int, change: Callable[[str], str] = str):
        self.name, self.change = name, change
        self.launches: Counter[Kernel] = Counter()
        self._implementation, self._random = implementation, random.Random(seed)
        self._arguments: tuple[object, ...] = ()

    def launched(self) -> AbstractContextManager[object]:
        """A context in which the backend's launches come to ``launch``."""
        raise NotImplementedError

    def launch(
        self, kernel: Kernel, blocks: int, threads: int, arguments: Sequence[int | bytes],
        spans: Sequence[tuple[int, int]] = (), shared: int = 0,
    ) -> None:  # fmt: skip
        """Runs a kernel. It may access the tensors in the arguments of the call that launches it, and ``spans``."""
        self.launches[kernel] += 1
        rows = [span for each in self._arguments if isinstance(each, TensorBatch) for span in _spans_of_rows(each)]
        spans = [*_spans_of(self._arguments, set()), *rows, *spans]
        kernel.launch(blocks, threads, arguments, spans, self._random.getrandbits(63), shared)

    def run(self, function: str, *arguments: object) -> object:
        """Calls one of the backend's functions."""
        self._arguments = arguments
        with self.launched():
            return getattr(self._implementation, function)(*arguments)

    @contextmanager
    def backend(self) -> Iterator[backends.Backend]:
        """A backend, known to the optimizer by its name inside of the context."""
        call = lambda function: lambda *arguments: self.run(function, *arguments)
        cpu = backends._BY_NAME["cpu"]
        row = backends.Backend(
            self.name, "", ("cpu",), cpu.dtypes, False, lambda: None, call("masked_adamw_"), call("sum_of_squares"),
            call("mask_gradients_"), call("keep_mask"), call("bucket_planes"),
        )  # fmt: skip
        with mock.patch.dict(backends._BY_NAME, {row.name: row}):
            yield row


def _spans_of_rows(batch: TensorBatch) -> Iterator[tuple[int, int]]:
    """The memory that a batch names by address: it may hold its tensors no more."""
    grads = batch.grad_dtype or batch.param_dtype
    sizes = {"param": batch.param_dtype.itemsize, "copy": grads.itemsize}
    sizes |= dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), batch.moment_dtype.itemsize)
    for row in tensor_table(batch):
        plan = batch.hypers[row["hyper"]].plan
        planes = num_planes(plan.buckets) if plan.bitpacked else 1
        memory = {name: int(row["numel"]) * size for name, size in sizes.items()}
        memory |= {"step": 4, "mask_words": 4 * planes * num_words(int(row["numel"]))}
        yield from ((int(row[name]), size) for name, size in memory.items() if row[name])


def _spans_of(value: object, seen: set[int]) -> Iterator[tuple[int, int]]:
    """The memory of all tensors in a value: in lists, dictionaries, dataclasses and the package's other objects."""
    if id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        if value.numel():
            yield value.data_ptr(), value.nbytes
        return
    parts = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif type(value).__module__.startswith("graddrop_kernels."):
        parts = getattr(value, "__dict__", {}).values()
    if parts:
        seen.add(id(value))
    for each in parts:
        yield from _spans_of(each, seen)
