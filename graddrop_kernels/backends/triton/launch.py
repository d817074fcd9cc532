"""Prepares launches: the batch's tables, the prologue, block sizes, and the compile-time constants of a kernel."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from ..batch import TensorBatch
from ..device_tables import CHUNK, DeviceTables
from ..launches import Launch
from ..tensor_table import MASK_KINDS
from .probe import interpreted
from .prologue import prologue_kernel

ELEMENTS, WARPS = 8, 4  # per thread, per program; 16 elements need 200 registers, 4 double the cost of shared work
INTERPRETED_BLOCK = 65536  # the interpreter's cost is per program


def tables_of(batch: TensorBatch, for_norm: bool = False) -> DeviceTables:
    """The batch's tables, up to date."""
    return DeviceTables.of(batch, for_norm, INTERPRETED_BLOCK if interpreted() else CHUNK)


def prologue(tables: DeviceTables, found_inf: torch.Tensor | None, ages: bool, advance: bool) -> None:
    """Writes the step rows on the current device, with ``ages`` the table by age, with ``advance`` the step counts."""
    prologue_kernel[(tables.num_rows,)](
        tables.rows, tables.hypers, tables.step_rows, tables.by_age, found_inf, tables.age_stride,
        FOUND_INF=found_inf is not None, AGES_=ages, ADVANCE=advance, LANES=32, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(maxsize=64)
def block_of(device: torch.device) -> int:
    """Elements that a program updates at a time: 1024, or 2048 where a warp has 64 threads (AMD's CDNA)."""
    if interpreted():
        return INTERPRETED_BLOCK
    return ELEMENTS * WARPS * (torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32)


def constants(
    launch: Launch, param_dtype: torch.dtype, moment_dtype: torch.dtype, grad_dtype: torch.dtype | None = None,
    copies: bool = False, stochastic: int = 0, grad_scale: bool = False, clip: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time constants of a launch's update kernel."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    grad_dtype = grad_dtype or param_dtype
    vector = 4 if torch.float32 in (param_dtype, grad_dtype, moment_dtype) else 8
    return {
        "P": types[param_dtype], "G": types[grad_dtype], "M": types[moment_dtype], "KIND_": MASK_KINDS[launch.kind],
        "PLANES": launch.planes, "VEC": vector if launch.aligned else 1, "ROWS": launch.rows,
        "AMSGRAD": launch.amsgrad, "FROZEN_": launch.frozen, "UPDATE": launch.update, "CAUTIOUS": launch.cautious,
        "AGES_": launch.ages, "COPY_": copies, "STOCHASTIC": stochastic, "GRAD_SCALE": grad_scale, "CLIP": clip,
        "INTERPRETED": interpreted(),
    }  # fmt: skip


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """A context that makes the device the current one, for the launch and its stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
