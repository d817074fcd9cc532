"""The cpu backend: csrc/cpu through its C functions. The default on CPU tensors when it was built."""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..masks.bitmask import num_planes, num_words
from ..masks.row_block import RowBlock
from .batch import TensorBatch
from .tensor_table import DTYPES, TABLE_VERSION, TensorRow, hyper_table, tensor_table

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # the best first
_LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, the reason why there is none). Tried once."""
    if not _LIBRARY.exists():
        return None, "csrc was not compiled; install a C++ compiler and run pip install again (without GRADDROP_NO_EXT)"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        version = library.graddrop_cpu_table_version()
        if version != TABLE_VERSION:
            return None, (
                f"{_LIBRARY.name} was built from other sources (table version {version}, not {TABLE_VERSION}); "
                "run pip install again"
            )
        # torch is loaded already; this finds the same library by its path.
        # The C ABI's parallel_for runs on torch's own threads.
        torch_cpu = next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))
        library.graddrop_cpu_set_parallel_for(
            ctypes.cast(ctypes.CDLL(str(torch_cpu)).torch_parallel_for, ctypes.c_void_p)
        )
    except (OSError, AttributeError, StopIteration) as error:
        return None, f"{_LIBRARY.name} cannot be loaded with torch {torch.__version__}: {error}"
    tables = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.graddrop_cpu_masked_adamw.argtypes = [*tables, *[ctypes.c_int32] * 4, *[ctypes.c_void_p] * 2]
    library.graddrop_cpu_mask_gradients.argtypes = [*tables, ctypes.c_int32]
    library.graddrop_cpu_sum_of_squares.argtypes = [*tables, ctypes.c_int32, ctypes.c_int32]
    library.graddrop_cpu_sum_of_squares.restype = ctypes.c_double
    library.graddrop_cpu_uniform16.argtypes = [
        ctypes.c_uint64,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.graddrop_cpu_bucket_planes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.graddrop_cpu_memory_order_planes.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    library.graddrop_cpu_philox.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.graddrop_cpu_isa.restype = ctypes.c_char_p
    requested = os.environ.get("GRADDROP_CPU_ISA", "")
    if library.graddrop_cpu_select_isa(requested.encode()) != 0:
        return None, (
            f"GRADDROP_CPU_ISA={requested!r} is not among this processor's and this build's: {', '.join(ISAS)}"
        )
    return library, None


def unavailable() -> str | None:
    """None when the library can run, else the reason and the remedy."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError with the reason and the remedy when there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"the cpu backend cannot run: {reason}")
    return loaded


def isa() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or portable. GRADDROP_CPU_ISA sets it at start."""
    name: bytes = library().graddrop_cpu_isa()
    return name.decode()


def select_isa(name: str) -> None:
    """Switches the instruction set; "" takes the best. All give the same bits. For tests and benchmarks.

    Raises:
        ValueError: this processor or this build does not have it.
    """
    if library().graddrop_cpu_select_isa(name.encode()) != 0:
        raise ValueError(
            f"instruction set {name!r} is not among this processor's and this build's: {', '.join(ISAS)}"
        )


@contextlib.contextmanager
def using_isa(name: str | None) -> Iterator[None]:
    """Selects an instruction set for a with block; None leaves it as it is."""
    in_use = isa() if name else ""
    if name:
        select_isa(name)
    try:
        yield
    finally:
        if name:
            select_isa(in_use)


def available_isas() -> tuple[str, ...]:
    """The members of ISAS that this processor and this build have; () if the library cannot run."""
    found = []
    for name in ISAS if unavailable() is None else ():
        with contextlib.suppress(ValueError), using_isa(name):
            found.append(name)
    return tuple(found)


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def masked_adamw_(batch: TensorBatch) -> None:
    """Makes one masked AdamW step on the batch, in place. One call, on torch.get_num_threads() threads, steps all."""
    if batch.found_inf is not None and batch.found_inf != 0:
        return
    table, hypers = _tables(batch, for_norm=False)
    grad_scale, clip_factor = (
        None if scalar is None else scalar.data_ptr() for scalar in (batch.grad_scale, batch.clip_factor)
    )
    library().graddrop_cpu_masked_adamw(
        table.ctypes.data, len(table), ctypes.addressof(hypers),
        DTYPES[batch.param_dtype], DTYPES[batch.grad_dtype or batch.param_dtype], DTYPES[batch.moment_dtype],
        batch.stochastic, grad_scale, clip_factor,
    )  # fmt: skip
    batch.table.planes = []


def sum_of_squares(batch: TensorBatch, masked: bool) -> torch.Tensor:
    """As reference.sum_of_squares: float64 tensor () on the CPU. The bits do not depend on the number of threads or the
    instruction set.
    """
    table, hypers = _tables(batch, for_norm=True)
    grad_dtype = DTYPES[batch.grad_dtype or batch.param_dtype]
    total = library().graddrop_cpu_sum_of_squares(
        table.ctypes.data, len(table), ctypes.addressof(hypers), grad_dtype, masked
    )
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def mask_gradients_(batch: TensorBatch) -> None:
    """Masks the gradients of the batch in place, on torch.get_num_threads() threads."""
    table, hypers = _tables(batch, for_norm=False)
    grad_dtype = DTYPES[batch.grad_dtype or batch.param_dtype]
    library().graddrop_cpu_mask_gradients(table.ctypes.data, len(table), ctypes.addressof(hypers), grad_dtype)
    batch.table.planes = []


class _Tables:
    """The tables of csrc/tensor_table.h for a batch."""

    def __init__(self, batch: TensorBatch):
        self.rows = tensor_table(batch)
        self.hypers: Any = None
        self.ordered = [(row, order) for row, order in enumerate(batch.orders) if order is not None]
        self.hyper_rows = self.rows["hyper"].copy()
        self.planes: list[torch.Tensor] = []  # of masks in the order of memory, as long as a step
        self.left_by_norm: int | None = None  # batch version: its update reuses the tables of its norm


def _tables(batch: TensorBatch, for_norm: bool) -> tuple[Any, Any]:
    """The tables of this step: (TensorRows, HyperRows). The update reuses those that the norm of its step has built."""
    if batch.table is None:
        batch.table = _Tables(batch)
    tables = batch.table
    if for_norm or tables.left_by_norm != batch.version:  # 40 us for 400 tensors
        tables.rows["grad"] = batch.grad_addresses()
        tables.hypers = hyper_table(batch.hypers)
        if tables.ordered:
            _draw_in_order(tables, batch)
    tables.left_by_norm = batch.version if for_norm else None
    return tables.rows, tables.hypers


def _draw_in_order(tables: _Tables, batch: TensorBatch) -> None:
    """Draws the masks of the rows that have an order, and gives each a HyperRow by which the step reads them as stored
    ones.
    """
    stored: dict[int, int] = {}  # HyperRow: the one that reads its mask
    hypers = list(batch.hypers)
    for row, order in tables.ordered:
        drawn = int(tables.hyper_rows[row])
        plan = batch.hypers[drawn].plan
        tables.rows["hyper"][row] = drawn
        if plan.kind != "bernoulli" and (plan.kind != "bucket" or plan.bitpacked):
            continue
        shape = order.transposed()
        assert shape is not None, "policies that draw are given other orders through copies"
        planes = torch.zeros(
            num_planes(plan.buckets) if plan.kind == "bucket" else 1, num_words(int(tables.rows["numel"][row])),
            dtype=torch.int32, device="cpu",
        )  # fmt: skip
        library().graddrop_cpu_memory_order_planes(
            tables.rows[row : row + 1].ctypes.data, ctypes.addressof(tables.hypers[drawn]), *shape, len(planes),
            planes.data_ptr(),
        )  # fmt: skip
        tables.planes.append(planes)
        if drawn not in stored:
            stored[drawn] = len(hypers)
            kind = {"bitpacked": True} if plan.kind == "bucket" else {"kind": "fixed"}
            hypers.append(replace(batch.hypers[drawn], plan=replace(plan, **kind)))
        tables.rows["hyper"][row], tables.rows["mask_words"][row] = stored[drawn], planes.data_ptr()
    if stored:
        tables.hypers = hyper_table(hypers)


def uniform16(key: int, draw: int, domain: int, first: int, count: int) -> torch.Tensor:
    """As philox.uniform16, made by the kernels: uint16 tensor of shape (count,)."""
    out = torch.empty(count, dtype=torch.uint16, device="cpu")
    library().graddrop_cpu_uniform16(key, draw & 0xFFFFFFFF, domain, first, count, out.data_ptr())
    return out


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int) -> torch.Tensor:
    """The buckets of a layout's elements as bit-planes (bitmask.pack_buckets), made by the kernels:
    int32 tensor of shape (num_planes(buckets), num_words(numel)).
    """
    planes = torch.zeros(num_planes(buckets), num_words(numel), dtype=torch.int32, device="cpu")
    row = TensorRow(
        numel=numel, base=layout.base, local_inner=layout.local_inner, global_inner=layout.global_inner, key=key
    )
    library().graddrop_cpu_bucket_planes(ctypes.addressof(row), buckets, planes.size(0), planes.data_ptr())
    return planes


def philox(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """One Philox4x32-10 call per row, made by csrc/philox.h: counters uint32 (n, 4), keys uint64 (n,) -> uint32 (n, 4).

    For tests.
    """
    out = torch.empty_like(counters)
    library().graddrop_cpu_philox(counters.data_ptr(), keys.data_ptr(), counters.size(0), out.data_ptr())
    return out
