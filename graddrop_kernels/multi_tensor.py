"""TensorBatch: the tensors that one backend call updates, with everything the call needs beside them in plain numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .layout import RowBlock
from .plan import MaskPlan


@dataclass(frozen=True)
class Hyper:
    """One row of hyper-parameters: what the parameters of one group under one plan share."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    plan: MaskPlan


@dataclass(slots=True)
class Row:
    """One parameter with a gradient. ``state`` holds step (0-d float32), exp_avg, exp_avg_sq and with amsgrad max_exp_avg_sq."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict
    key: int  # 64-bit Philox key
    layout: RowBlock  # where the elements lie in the whole parameter
    hyper: Hyper
    mask_words: torch.Tensor | None = None  # int32 bit-planes of the buckets, or the bits of a fixed mask


@dataclass
class TensorBatch:
    """Parallel lists, one entry a parameter: contiguous, on one device, with the same dtypes. It knows nothing of groups or policies.

    ``steps`` are advanced by the backend call; ``max_exp_avg_sqs`` has None without amsgrad; ``hyper_rows`` are indices into ``hypers``.
    """

    device: torch.device
    param_dtype: torch.dtype
    moment_dtype: torch.dtype
    hypers: list[Hyper] = field(default_factory=list)
    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[torch.Tensor | None] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    layouts: list[RowBlock] = field(default_factory=list)
    mask_words: list[torch.Tensor | None] = field(default_factory=list)
    hyper_rows: list[int] = field(default_factory=list)


def make_batches(rows: Iterable[Row]) -> tuple[list[TensorBatch], Callable[[], None]]:
    """Sorts rows into batches by (device, dtypes). Call the returned function after the step: it copies staged tensors back.

    An element's index is its place in contiguous order, whatever the strides, so tensors with other strides are staged through contiguous copies:
    slower, and right where torch's fused CPU kernel silently is not.
    """
    batches: dict[tuple, TensorBatch] = {}
    hyper_rows: dict[tuple, int] = {}
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []

    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_contiguous():
            return tensor
        copy = tensor.contiguous()
        staged.append((tensor, copy))
        return copy

    for row in rows:
        param, state, hyper = row.param, row.state, row.hyper
        exp_avg = state["exp_avg"]
        key = (param.device, param.dtype, exp_avg.dtype)
        batch = batches.get(key)
        if batch is None:
            batch = batches[key] = TensorBatch(*key)
        hyper_key = (key, id(hyper))  # rows of one group and plan share the object
        index = hyper_rows.get(hyper_key)
        if index is None:
            index = hyper_rows[hyper_key] = len(batch.hypers)
            batch.hypers.append(hyper)
        batch.params.append(contiguous(param))
        batch.grads.append(row.grad if row.grad.is_contiguous() else row.grad.contiguous())
        batch.exp_avgs.append(contiguous(exp_avg))
        batch.exp_avg_sqs.append(contiguous(state["exp_avg_sq"]))
        batch.max_exp_avg_sqs.append(contiguous(state["max_exp_avg_sq"]) if hyper.amsgrad else None)
        batch.steps.append(state["step"])
        batch.keys.append(row.key)
        batch.layouts.append(row.layout)
        batch.mask_words.append(row.mask_words)
        batch.hyper_rows.append(index)

    def write_back() -> None:
        for tensor, copy in staged:
            tensor.copy_(copy)

    return list(batches.values()), write_back
