"""The rows of csrc/tensor_table.h as ctypes structures, field by field. Fills them from a TensorBatch."""

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

import numpy as np
import torch

from ..masks.bitmask import num_planes
from .batch import Hyper, TensorBatch

TABLE_VERSION = 5  # kTableVersion
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType
NUMBER_AT = {torch.float32: 1, torch.float64: 2}  # NumberAt
# MaskKind
MASK_KINDS = {kind: number for number, kind in enumerate(("keep", "off", "bernoulli", "gaussian", "bucket", "fixed"))}


class TensorRow(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "mask_words")
        ),
        *((name, c_int64) for name in ("numel", "base", "local_inner", "global_inner")),
        ("key", c_uint64),
        ("hyper", c_int64),
        ("copy", c_void_p),
    ]


TENSOR_ROW = np.dtype(TensorRow)  # for 400 tensors a column is filled from a list in 5 us, field by field in 300 us


class HyperRow(ctypes.Structure):
    _fields_ = [
        *((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "scale", "age_rate")),
        ("global_step", c_int64),
        ("ages", c_void_p),
        ("num_ages", c_int64),
        ("draw", c_int64),
        *((name, c_int32) for name in (
            "kind", "masked", "threshold", "buckets", "first_bucket", "last_bucket",
            "num_planes", "amsgrad", "maximize", "lr_at", "weight_decay_at", "cautious",
        )),
    ]  # fmt: skip


_PACKED = struct.Struct("7d q Q 2q 12i")  # a HyperRow in one call, in a third of the time of its fields one by one

assert _PACKED.size == ctypes.sizeof(HyperRow)
assert ctypes.sizeof(TensorRow) == 112 and ctypes.sizeof(HyperRow) == 136  # as csrc/tensor_table.h asserts


def tensor_table(batch: TensorBatch) -> np.ndarray[Any, Any]:
    """Returns one TensorRow per parameter, without the address of its gradient, which is new in every step: those that
    the batch has, or new ones.
    """
    if batch.rows is not None:
        rows: np.ndarray[Any, Any] = batch.rows
        return rows
    table = np.zeros(len(batch.params), TENSOR_ROW)
    columns: tuple[tuple[str, Sequence[torch.Tensor | None]], ...] = (
        ("param", batch.params), ("exp_avg", batch.exp_avgs), ("exp_avg_sq", batch.exp_avg_sqs),
        ("max_exp_avg_sq", batch.max_exp_avg_sqs), ("step", batch.steps), ("mask_words", batch.mask_words),
        ("copy", batch.copies or [None] * len(batch.params)),
    )  # fmt: skip
    for column, tensors in columns:
        table[column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    table["numel"] = [tensor.numel() for tensor in batch.params]
    for column in ("base", "local_inner", "global_inner"):
        table[column] = [getattr(layout, column) for layout in batch.layouts]
    table["key"] = batch.keys
    table["hyper"] = batch.hyper_rows
    return table


def hyper_table(hypers: list[Hyper], device: torch.device | None = None) -> Any:
    """Returns one HyperRow per Hyper. The table keeps the age arrays alive.

    ``device``: an lr or weight decay that is a tensor on it is stored as its address. Any other is stored as its value,
    for which the host may have to wait for a device.
    """
    table: Any = (HyperRow * len(hypers))()
    table.age_arrays = []
    for index, hyper in enumerate(hypers):
        plan = hyper.plan
        ages = (c_int64 * len(plan.ages))(*plan.ages)
        table.age_arrays.append(ages)
        lr, lr_at = _number_or_address(hyper.lr, device)
        weight_decay, weight_decay_at = _number_or_address(hyper.weight_decay, device)
        _PACKED.pack_into(
            table, index * _PACKED.size,
            lr, hyper.beta1, hyper.beta2, hyper.eps, weight_decay, plan.scale, plan.age_rate, plan.global_step,
            ctypes.addressof(ages), len(plan.ages), -1 if plan.draw is None else plan.draw,
            MASK_KINDS[plan.kind], plan.frozen + 2 * plan.update, plan.threshold,
            plan.buckets, plan.first_bucket, plan.last_bucket, num_planes(plan.buckets) if plan.bitpacked else -1,
            hyper.amsgrad, hyper.maximize, lr_at, weight_decay_at, hyper.cautious,
        )  # fmt: skip
    return table


def _number_or_address(number: float | torch.Tensor, device: torch.device | None) -> tuple[float | torch.Tensor, int]:
    """(the number, or the float64 with the bits of its address; NumberAt)."""
    if isinstance(number, torch.Tensor) and number.device == device and number.dtype in NUMBER_AT:
        return struct.unpack("d", struct.pack("Q", number.data_ptr()))[0], NUMBER_AT[number.dtype]
    return number, 0
