"""RowBlock: a shard steps as its slice of the unsharded parameter does, bit for bit, on every engine."""

import dataclasses
import random
from typing import NamedTuple

import pytest
import torch
from cases import (
    BF16,
    ENGINES,
    EXACT,
    F16,
    F32,
    MODES,
    PLAIN,
    Engine,
    assert_same_bits,
    fused_engines,
    require,
)

from graddrop_kernels import backends
from graddrop_kernels.backends import cpu
from graddrop_kernels.backends.batch import Hyper, TensorBatch
from graddrop_kernels.masks import bitmask
from graddrop_kernels.masks.philox import stream_key
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import keep_and_bucket

ROWS, COLUMNS = 41, 333  # no multiple of any vector or of a Philox call


class Shard(NamedTuple):
    """A part of the [ROWS, COLUMNS] parameter: its layout, and what it takes of a tensor of the whole."""

    layout: RowBlock
    take: object  # whole tensor -> the shard, contiguous

    @staticmethod
    def columns(first: int, count: int, row: int = 0, rows: int = ROWS) -> "Shard":
        layout = RowBlock(row * COLUMNS + first, count, COLUMNS)
        return Shard(layout, lambda whole: whole[row : row + rows, first : first + count].contiguous().flatten())

    @staticmethod
    def flat(first: int, count: int) -> "Shard":
        return Shard(
            RowBlock(first, max(count, 1), max(count, 1)), lambda whole: whole.flatten()[first : first + count].clone()
        )


SHARDS = {
    "whole": Shard(RowBlock.whole(ROWS * COLUMNS), lambda whole: whole.flatten().clone()),
    "left columns": Shard.columns(0, 100),
    "odd columns": Shard.columns(101, 77),
    "one column": Shard.columns(332, 1),
    "three columns": Shard.columns(17, 3),
    "nine columns": Shard.columns(8, 9),
    "columns longer than a chunk": Shard.columns(5, 320),
    "columns of some rows": Shard.columns(33, 200, row=7, rows=11),
    "columns, the last row shorter": Shard(
        RowBlock(3 * COLUMNS + 50, 61, COLUMNS), lambda whole: whole[3:20, 50:111].flatten()[: 11 * 61 + 23].clone()
    ),
    "three of every seven elements": Shard(
        RowBlock(16, 3, 7), lambda whole: whole.flatten()[14 : 14 + 7 * 800].view(-1, 7)[:, 2:5].flatten()
    ),
    "rows": Shard.flat(5 * COLUMNS, 9 * COLUMNS),
    "an odd range": Shard.flat(1237, 6001),
    "one element": Shard.flat(777, 1),
    "nothing": Shard.flat(500, 0),
}

# Frozen buckets with and without ages; ages of a few and of many buckets are looked up differently.
PLANS = {
    "keep": MaskPlan("keep"),
    "bernoulli": MaskPlan("bernoulli", threshold=30_000, scale=65536 / 35536),
    "bernoulli frozen": MaskPlan("bernoulli", frozen=True, threshold=13_107, scale=65536 / 52429, draw=7, age_rate=0.8),
    "gaussian": MaskPlan("gaussian", scale=0.5),
    "buckets": MaskPlan("bucket", buckets=5, first_bucket=1, last_bucket=3),
    "buckets by age": MaskPlan("bucket", frozen=True, buckets=7, first_bucket=0, last_bucket=4, ages=(4, 3, 2, 2, 1)),
    "many buckets by age": MaskPlan(
        "bucket", frozen=True, buckets=100, first_bucket=20, last_bucket=90, ages=tuple(range(91))
    ),
    "fixed": MaskPlan("fixed", frozen=True, scale=2.0),
}
STORAGES = {"recompute": False, "bitpacked": True}
CASES = [
    pytest.param(plan, packed, id=f"{name}-{storage}" if plan.kind == "bucket" else name)
    for name, plan in PLANS.items()
    for storage, packed in STORAGES.items()
    if plan.kind == "bucket" or not packed
]
KEYS = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "copy")
# (parameter and moment dtype, master weights, stochastic rounding)
PLAIN_MODES = tuple((dtypes, False, False) for dtypes in ((F32, F32), (BF16, BF16), (F16, F32)))


def whole_tensors(
    generator: torch.Generator, dtypes, shape=(ROWS, COLUMNS), masters=False
) -> dict[str, torch.Tensor]:  # fmt: skip
    new = lambda dtype: torch.randn(shape, generator=generator).to(dtype)
    param_dtype, moment_dtype = dtypes
    tensors = {"param": new(F32 if masters else param_dtype), "grad": new(param_dtype), "exp_avg": new(moment_dtype)}
    if masters:
        tensors["copy"] = new(param_dtype)
    tensors |= {"exp_avg_sq": new(moment_dtype).abs(), "max_exp_avg_sq": new(moment_dtype).abs()}
    return tensors


def step(
    engine: Engine, shards: list[tuple[RowBlock, dict, torch.Tensor | None]], plan: MaskPlan, key: int, dtypes,
    masters=False, stochastic=False,
) -> list[dict]:  # fmt: skip
    """One step, the fifth, on all the shards in one batch; returns the new tensors."""
    device = torch.device(engine.device)
    hyper = Hyper(3e-2, 0.8, 0.95, 1e-3, 0.1, True, True, plan)
    stepped = (F32, F32) if masters else dtypes
    batch = TensorBatch(device, *stepped, grad_dtype=dtypes[0], stochastic=stochastic)
    batch.hypers = [hyper]
    for layout, tensors, words in shards:
        moved = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        batch.params.append(moved["param"])
        batch.copies += [moved["copy"]] if masters else []
        batch.grads.append(moved["grad"])
        batch.exp_avgs.append(moved["exp_avg"])
        batch.exp_avg_sqs.append(moved["exp_avg_sq"])
        batch.max_exp_avg_sqs.append(moved["max_exp_avg_sq"])
        batch.steps.append(torch.tensor(4.0, device=device))
        batch.keys.append(key)
        batch.layouts.append(layout)
        batch.mask_words.append(None if words is None else words.to(device))
        batch.hyper_rows.append(0)
    with cpu.using_isa(engine.isa):
        backends.select(engine.backend, device, *stepped).masked_adamw_(batch)
    assert all(count == 5 for count in batch.steps)
    lists = (batch.params, batch.exp_avgs, batch.exp_avg_sqs, batch.max_exp_avg_sqs, *[batch.copies] * masters)
    return [{name: tensors[i].cpu() for name, tensors in zip(KEYS, lists)} for i in range(len(shards))]


def words_of(plan: MaskPlan, key: int, layout: RowBlock, numel: int, fixed: torch.Tensor) -> torch.Tensor | None:
    if plan.kind == "fixed":
        return bitmask.pack(fixed)
    return backends.bucket_planes(key, plan.buckets, layout, numel, torch.device("cpu")) if plan.bitpacked else None


@pytest.mark.parametrize("dtypes, masters, stochastic", [*PLAIN_MODES, *MODES], ids=str)
@pytest.mark.parametrize("plan, packed", CASES)
def test_shards_step_as_slices_of_the_whole(plan, packed, dtypes, masters, stochastic, seed):
    """All shards in one batch, against slices of the whole parameter's step by the same engine; and all fused
    engines against "exact".
    """
    plan = dataclasses.replace(plan, bitpacked=packed)
    generator = torch.Generator().manual_seed(seed)
    key, whole = stream_key("w", seed), whole_tensors(generator, dtypes, masters=masters)
    fixed = torch.rand((ROWS, COLUMNS), generator=generator) < 0.4
    count = ROWS * COLUMNS
    exact = None
    for engine in (EXACT, *fused_engines((F32, F32) if masters else dtypes), PLAIN):
        with cpu.using_isa(engine.isa):
            flat = {name: tensor.flatten() for name, tensor in whole.items()}
            rows = [(RowBlock.whole(count), flat, words_of(plan, key, RowBlock.whole(count), count, fixed))]
            for shard in SHARDS.values():
                part = {name: shard.take(tensor) for name, tensor in whole.items()}
                rows.append(
                    (shard.layout, part, words_of(plan, key, shard.layout, part["param"].numel(), shard.take(fixed)))
                )
        result, *parts = step(engine, rows, plan, key, dtypes, masters, stochastic)
        exact = exact or result
        for name, tensor in result.items():
            if engine is not PLAIN:
                assert_same_bits(tensor, exact[name], f"{name} of the whole by {engine}")
            for (what, shard), part in zip(SHARDS.items(), parts):
                assert_same_bits(part[name], shard.take(tensor.view(ROWS, COLUMNS)), f"{name} of {what} by {engine}")


@pytest.mark.parametrize("plan, packed", CASES)
def test_masks_of_shards_are_slices_of_the_mask(plan, packed, seed):
    plan = dataclasses.replace(plan, bitpacked=packed)
    key = stream_key("w", seed)
    fixed = torch.rand((ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed)) < 0.4
    count = ROWS * COLUMNS
    words = words_of(plan, key, RowBlock.whole(count), count, fixed)
    whole = keep_and_bucket(plan, key, 4, RowBlock.whole(count), count, words)
    for what, shard in SHARDS.items():
        numel = shard.take(fixed).numel()
        part = keep_and_bucket(
            plan, key, 4, shard.layout, numel, words_of(plan, key, shard.layout, numel, shard.take(fixed))
        )
        for mine, all_of_it in zip(part, whole):
            assert (mine is None) == (all_of_it is None)
            if mine is not None:
                assert_same_bits(mine, shard.take(all_of_it.view(ROWS, COLUMNS)), what)


@pytest.mark.parametrize("buckets", [1, 2, 5, 64, 100])
def test_bucket_planes_of_shards(buckets, seed, isa):
    key = stream_key("w", seed)
    whole = bitmask.element_buckets(key, buckets, 0, ROWS * COLUMNS).view(ROWS, COLUMNS)
    for what, shard in SHARDS.items():
        expected = shard.take(whole)
        planes = cpu.bucket_planes(key, buckets, shard.layout, expected.numel())
        assert_same_bits(planes, bitmask.pack_buckets(expected, buckets), what)


def test_bucket_planes_without_the_library_are_the_same(seed, monkeypatch):
    require("cpu")
    key, layout = stream_key("w", seed), SHARDS["odd columns"].layout
    compiled = backends.bucket_planes(key, 12, layout, 41 * 77, torch.device("cpu"))
    monkeypatch.setattr(backends, "BACKENDS", [row for row in backends.BACKENDS if row.name == "reference"])
    assert_same_bits(backends.bucket_planes(key, 12, layout, 41 * 77, torch.device("cpu")), compiled)


BASES = [1, 3, 7, 2**31 - 1000, 2**32 - 5, 2**33 - 1001, 2**34 - 77, 2**35 - 2003, 2**38 + 1]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "buckets by age"])
def test_far_shards(name, base, seed):
    """Rows of a parameter with more than 2^31 elements: the step of a far shard, by every engine, its mask from the
    draws of the global indices.
    """
    plan, key = PLANS[name], stream_key("w", seed)
    rows, inner = 5, random.Random(seed).randrange(200, 600)
    layout = RowBlock(base, inner, 2**20 + 3)
    tensors = {
        key: tensor.flatten()
        for key, tensor in whole_tensors(torch.Generator().manual_seed(seed), (F32, F32), (rows, inner)).items()
    }
    (exact,) = step(EXACT, [(layout, tensors, None)], plan, key, (F32, F32))
    keep, _ = keep_and_bucket(plan, key, 4, layout, rows * inner)
    if keep is not None:
        single = [
            keep_and_bucket(plan, key, 4, RowBlock(base + row * (2**20 + 3), inner, inner), inner)[0]
            for row in range(rows)
        ]
        assert_same_bits(keep, torch.cat(single))
        assert 0.2 < keep.double().mean() < 0.8
    for engine in fused_engines((F32, F32)):
        (fused,) = step(engine, [(layout, tensors, None)], plan, key, (F32, F32))
        for tensor in exact:
            assert_same_bits(fused[tensor], exact[tensor], f"{tensor} by {engine}")


def test_runs_cover_the_local_elements_in_order():
    layout = RowBlock(base=10, local_inner=4, global_inner=100)
    assert list(layout.runs(10)) == [(0, 10, 4), (4, 110, 4), (8, 210, 2)]
    assert list(layout.runs(0)) == []
    assert list(RowBlock.whole(0).runs(0)) == [] and list(RowBlock.whole(9).runs(9)) == [(0, 0, 9)]


def test_engines_cover_all_backends():
    assert {engine.backend for engine in ENGINES} == set(backends.available_backends())


@pytest.mark.parametrize("running, maker", [
    (("cpu", "triton", "cuda"), "triton"), (("cpu", "cuda"), "cuda"), (("cpu",), "reference"),
])  # fmt: skip
def test_masks_of_a_gpu_are_made_by_the_first_backend_that_runs_there(running, maker, monkeypatch):
    def told(backend):
        name = lambda *_: backend.name
        return dataclasses.replace(
            backend, devices=("cuda",) if backend.name == "triton" else backend.devices,
            keep_mask=backend.keep_mask and name, bucket_planes=backend.bucket_planes and name,
            unavailable=lambda: None if backend.name in (*running, "reference", "exact") else "absent",
        )  # fmt: skip

    monkeypatch.setattr(backends, "BACKENDS", [told(backend) for backend in backends.BACKENDS])
    layout, device = RowBlock.whole(9), torch.device("cuda")
    assert backends.keep_mask(MaskPlan("bernoulli"), 1, 0, layout, 9, None, device) == maker
    assert backends.bucket_planes(1, 3, layout, 9, device) == maker
    assert backends.keep_mask(MaskPlan("bernoulli"), 1, 0, layout, 9, None, torch.device("cpu")) == "reference"
