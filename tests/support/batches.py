"""Batches for the backends, without an optimizer: plans of every kind, layouts, values of all scales."""

import dataclasses
import random

import torch
from cases import F16, F32, assert_same_bits

from graddrop_kernels import backends
from graddrop_kernels.backends.batch import Hyper, TensorBatch
from graddrop_kernels.masks import bitmask
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock

CHUNK = 4096
SIZES = (0, 1, 3, 4, 5, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 65537)
BUCKETS = {"buckets": 5, "first_bucket": 1, "last_bucket": 3}
PLANS = {
    "keep": MaskPlan("keep"),
    "off": MaskPlan("off"),
    "bernoulli": MaskPlan("bernoulli", threshold=30_000, scale=65536 / 35536),
    "bernoulli frozen": MaskPlan("bernoulli", frozen=True, threshold=60_000, draw=7, age_rate=0.8),
    "gaussian": MaskPlan("gaussian", scale=0.5),
    "buckets": MaskPlan("bucket", **BUCKETS),
    "buckets frozen": MaskPlan("bucket", frozen=True, global_step=9, **BUCKETS),
    "a bucket of 300": MaskPlan("bucket", frozen=True, buckets=300, first_bucket=7, last_bucket=7),
    "ages": MaskPlan("bucket", frozen=True, buckets=7, first_bucket=0, last_bucket=4, ages=(4, 3, 2, 2, 1)),
    "many ages": MaskPlan("bucket", frozen=True, buckets=100, first_bucket=20, last_bucket=90, ages=tuple(range(91))),
    "one bucket": MaskPlan("bucket", frozen=True, buckets=1, ages=(3,)),
    "fixed": MaskPlan("fixed", scale=2.0),
    "fixed frozen": MaskPlan("fixed", frozen=True, scale=1.5),
    "keep update": MaskPlan("keep", scale=1.7, update=True),
    "off update": MaskPlan("off", scale=1.7, update=True),
    "bernoulli update": MaskPlan("bernoulli", threshold=30_000, scale=65536 / 35536, update=True),
    "buckets update": MaskPlan("bucket", update=True, **BUCKETS),
    "fixed update": MaskPlan("fixed", scale=1.5, update=True),
}
PLANS |= {
    f"{name} in planes": dataclasses.replace(plan, bitpacked=True)
    for name, plan in PLANS.items()
    if plan.kind == "bucket"
}
OF_GRADIENTS = {name: plan for name, plan in PLANS.items() if not plan.update}  # masks on gradients
DROPPING = [  # names of those that drop gradients
    name for name, plan in OF_GRADIENTS.items() if plan.kind not in ("keep", "gaussian")
]
LISTS = ("params", "copies", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "grads", "steps")
LAYOUTS = (
    (4099, RowBlock(2**40 + 8, 4099, 4099)),  # a range that begins with a Philox call
    (4099, RowBlock(2**33 + 5, 4099, 4099)),  # and one that does not
    (24 * 211, RowBlock(16, 24, 64)),  # columns in whole calls: an aligned launch
    (7 * 600, RowBlock(3, 7, 100)),  # columns not in whole calls
    (1200 * 9 - 5, RowBlock(40, 1200, 4000)),  # the last row is not whole
)


def generator_of(seed: int, *case) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"{seed} {case}").getrandbits(40))


def at_offset(tensor: torch.Tensor, offset: int, device="cpu") -> torch.Tensor:
    """Returns a copy that begins ``offset`` elements into its memory."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    return room[offset:].view_as(tensor).copy_(tensor)


def words_of(plan: MaskPlan, key: int, layout: RowBlock, numel: int, generator) -> torch.Tensor | None:
    if plan.kind == "fixed":
        return bitmask.pack(torch.rand(numel, generator=generator) < 0.3)
    return backends.bucket_planes(key, plan.buckets, layout, numel, torch.device("cpu")) if plan.bitpacked else None


def batch_of(
    generator, plans, dtypes, layouts, offset=0, amsgrad=False, maximize=False, decay=0.1, masters=False,
    stochastic=False, cautious=False,
) -> TensorBatch:  # fmt: skip
    """Makes a row per (numel, layout), its plan the next of ``plans``; values of all scales; gradients of 0, inf and
    NaN.

    ``dtypes``: of the parameters (with ``masters`` of their copies) and of the moments.
    """
    param_dtype, moment_dtype = dtypes
    stepped = F32 if masters else param_dtype
    batch = TensorBatch(
        torch.device("cpu"), stepped, moment_dtype, grad_dtype=param_dtype, stochastic=stochastic
    )  # fmt: skip
    batch.hypers = [Hyper(3e-2, 0.8, 0.95, 1e-3, decay, amsgrad, maximize, plan, cautious) for plan in plans]
    low = -3.0 if F16 in dtypes else -22.0

    def drawn(numel, dtype):
        scales = 10 ** (low + (2 - low) * torch.rand(numel, generator=generator))
        return at_offset((torch.randn(numel, generator=generator) * scales).to(dtype), offset)

    for i, (numel, layout) in enumerate(layouts):
        grad = drawn(numel, param_dtype)
        grad[torch.rand(numel, generator=generator) < 0.02] = 0.0
        for value in (torch.inf, -torch.inf, torch.nan):
            grad[torch.rand(numel, generator=generator) < 0.005] = value
        key = int(torch.randint(2**62, (), generator=generator))
        batch.params.append(drawn(numel, stepped))
        if masters:
            batch.copies.append(drawn(numel, param_dtype))
        batch.grads.append(grad)
        batch.exp_avgs.append(drawn(numel, moment_dtype))
        batch.exp_avg_sqs.append(drawn(numel, moment_dtype).abs_())
        batch.max_exp_avg_sqs.append(drawn(numel, moment_dtype).abs_() if amsgrad else None)
        batch.steps.append(torch.tensor(3.0 + i))
        batch.keys.append(key)
        batch.layouts.append(layout)
        batch.hyper_rows.append(i % len(plans))
        batch.mask_words.append(words_of(plans[i % len(plans)], key, layout, numel, generator))
    return batch


def copy_of(batch: TensorBatch, device="cpu") -> TensorBatch:
    """Copies a batch. The copies begin as far into their memory as the originals."""
    copied = lambda tensor: None if tensor is None else at_offset(tensor, tensor.storage_offset(), device)
    copies = {name: [copied(tensor) for tensor in getattr(batch, name)] for name in (*LISTS, "mask_words")}
    copies |= {name: copied(getattr(batch, name)) for name in ("grad_scale", "clip_factor")}
    return dataclasses.replace(batch, device=torch.device(device), table=None, **copies)


def assert_same_batches(actual: TensorBatch, expected: TensorBatch, what: str) -> None:
    for name in LISTS:
        for i, (a, b) in enumerate(zip(getattr(actual, name), getattr(expected, name))):
            if a is not None:
                assert_same_bits(a, b, f"{what}: {name}[{i}] of {a.numel()} elements", any_nan=True)
