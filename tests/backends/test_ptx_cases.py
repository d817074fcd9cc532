"""What Triton compiles for three generations of GPUs, and what nvcc has compiled, run on the CPU (tests/support/ptx):
the bits of "exact", whatever the order of programs, with every access inside of its tensor.

A drawn part of each table, another one every run; with GRADDROP_PTX=all (make test-ptx) verify's table whole.
"""

import itertools
import math
import os
import random
from importlib.util import find_spec

import pytest
import torch
from batches import (
    CHUNK,
    LAYOUTS,
    OF_GRADIENTS,
    PLANS,
    SIZES,
    assert_same_batches,
    batch_of,
    copy_of,
    generator_of,
    words_of,
)
from cases import BF16, DTYPES, F16, F32, MODES, PAST_THE_LAST_EPOCH, assert_same_bits, require
from ptx import build
from ptx_backends.cuda import CudaEmulation, missing
from ptx_backends.emulation import Emulation
from test_gradient_norm import finite, masked_gradients

from graddrop_kernels.backends import cpu, cuda
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import keep_and_bucket
from graddrop_kernels.tools.verify.cases import make_cases
from graddrop_kernels.tools.verify.run_case import Engine, Findings, run_case

pytestmark = [
    pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH),
    pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn"),
]
COMPILED = ("triton on sm_80", "triton on sm_90", "triton on sm_100", "cuda")
PARTS = 4
CPU = torch.device("cpu")
EVERYTHING = os.environ.get("GRADDROP_PTX") == "all"


def emulation(compiled: str, seed: int, change=str) -> Emulation:
    """Of one of COMPILED; skips where there is nothing compiled."""
    if build.compiler() is None:
        pytest.skip("a C++ compiler is needed, to run PTX on the CPU")
    if compiled == "cuda":
        if reason := missing():
            pytest.skip(f"no PTX of nvcc: {reason}")
        return CudaEmulation(seed, change)
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("no PTX of Triton: it is not installed, or TRITON_INTERPRET is set")
    from ptx_backends.triton import TritonEmulation

    return TritonEmulation(int(compiled.rpartition("_")[2]), seed, change)


@pytest.fixture
def some(request, seed):
    """(things, number in a sample, in the whole suite, for GRADDROP_PTX=all) -> that many of them, drawn."""

    def draw(things, few, many, most=None):
        count = few if request.config.getoption("sample") else many
        return random.Random(seed).sample(things, (most or len(things)) if EVERYTHING else count)

    return draw


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("compiled", COMPILED)
def test_the_cases_of_verify(compiled, part, seed, some):
    cases = make_cases(seed, not EVERYTHING, [])
    random.Random(seed).shuffle(cases)
    emulated = emulation(compiled, seed)
    with emulated.backend() as row:
        engine = Engine(row, CPU)
        findings = {engine: Findings()}
        for case in some(cases[part::PARTS], 3, 7):
            run_case(case, [engine], findings)
    found = findings[engine]
    assert not found.failures, "\n".join(found.failures)
    assert (found.differing, found.wrong_masks) == (0, 0) and found.masks > 0
    print(f"{compiled}: {found.cases} cases, {found.elements} elements, {len(emulated.launches)} kernels, "
          f"{sum(emulated.launches.values())} launches")  # fmt: skip


@pytest.mark.parametrize("compiled", COMPILED)
def test_shards_and_modes(compiled, seed, some):
    """Whole tensors and parts of them, of any alignment, with gradients of infinities and NaN, unscaled and clipped."""
    require("cpu")
    emulated = emulation(compiled, seed)
    modes = [*((dtypes, False, False) for dtypes in DTYPES), *MODES]
    for name, mode, offset in some(list(itertools.product(PLANS, modes, (0, 1))), 2, 4, 60):
        rng = random.Random(f"{seed} {name} {mode}")
        layouts = [(size, RowBlock.whole(size)) for size in (1, 5, 33, CHUNK - 1, CHUNK + 8)] + list(LAYOUTS)
        flags = rng.random() < 0.5, rng.random() < 0.5, rng.choice((0.0, 0.1))  # amsgrad, maximize, decay
        (dtypes, *mode) = mode
        mine = batch_of(generator_of(seed, name, dtypes), [PLANS[name]], dtypes, layouts, offset, *flags, *mode)
        mine.clip_factor = rng.choice((None, torch.tensor(0.37)))
        mine.grad_scale = rng.choice((None, torch.tensor(5.3)))
        expected, before = copy_of(mine), copy_of(mine)
        emulated.run("masked_adamw_", mine)
        cpu.masked_adamw_(expected)
        what = f"{compiled}, {name}, {dtypes}, masters and stochastic {mode}, offset {offset}"
        assert_same_batches(mine, expected, what)
        assert any(not torch.equal(a, b) for a, b in zip(mine.exp_avgs, before.exp_avgs)), what
        if mine.grad_scale is not None:
            for given, written in zip(before.grads, mine.grads):
                assert_same_bits(written, (given.float() / 5.3).to(given.dtype), f"{what}: gradient", any_nan=True)


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
@pytest.mark.parametrize("compiled", COMPILED)
def test_norms(compiled, masked, seed, some):
    """Rows of several plans, several launches: within the bound of float64, in any order of programs the same bits."""
    torch.manual_seed(seed)
    emulated = emulation(compiled, seed)
    for dtypes, offset in some([(d, o) for d in DTYPES for o in (0, 1)], 1, 2):
        plans = random.Random(f"{seed} {dtypes}").sample(list(PLANS.values()), 6)
        layouts = [(100 + 637 * i, RowBlock.whole(100 + 637 * i)) for i in range(len(plans))] + list(LAYOUTS)
        batch = finite(batch_of(generator_of(seed, dtypes), plans, dtypes, layouts, offset))
        total = emulated.run("sum_of_squares", batch, masked)
        expected = masked_gradients(batch) if masked else batch.grads
        squares = math.fsum(x for tensor in expected for x in tensor.double().square().flatten().tolist())
        assert abs(total.item() - squares) <= 200 * 2.0**-53 * squares, (compiled, dtypes)
        for _ in range(2):
            assert_same_bits(emulated.run("sum_of_squares", batch, masked), total, "in another order of programs")
        if compiled == "cuda":  # the library's own emulation adds in the same order
            assert_same_bits(total, cuda.sum_of_squares(copy_of(batch), masked), "sum of squares")
        assert batch.table.arrived == 0


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_norm_of_more_chunks_than_the_last_program_adds_at_a_time(compiled, seed):
    torch.manual_seed(seed)
    layouts = [(1 + i % 3, RowBlock.whole(1 + i % 3)) for i in range(2048 + 30)]
    batch = finite(batch_of(generator_of(seed), [PLANS["bernoulli"]], (F32, F32), layouts))
    squares = math.fsum(x for tensor in batch.grads for x in tensor.double().square().flatten().tolist())
    total = emulation(compiled, seed).run("sum_of_squares", batch, False)
    assert abs(total.item() - squares) <= 200 * 2.0**-53 * squares


@pytest.mark.parametrize("compiled", COMPILED)
def test_gradients_masked_in_place(compiled, seed, some):
    """Rows of several plans in one batch, with infinities and NaN, of any layout and alignment."""
    emulated = emulation(compiled, seed)
    for dtype, offset in some(list(itertools.product((F32, BF16, F16), (0, 1))), 1, 3):
        plans = random.Random(f"{seed} {dtype}").sample(list(OF_GRADIENTS.values()), 9)
        layouts = [(size, RowBlock.whole(size)) for size in (1, 33, CHUNK + 8, 2 * CHUNK)] + list(LAYOUTS)
        batch = batch_of(generator_of(seed, dtype), plans, (dtype, dtype), layouts, offset)
        expected, before = copy_of(batch), copy_of(batch)
        emulated.run("mask_gradients_", batch)
        cpu.mask_gradients_(expected)
        what = f"{compiled}, {dtype}, offset {offset}, {[plan.kind for plan in plans]}"
        assert_same_batches(batch, expected, what)
        assert any(not torch.equal(a, b) for a, b in zip(batch.grads, before.grads)), what


@pytest.mark.parametrize("compiled", COMPILED)
def test_masks_and_bit_planes(compiled, seed, some):
    emulated, generator = emulation(compiled, seed), generator_of(seed)
    layouts = [(size, RowBlock.whole(size)) for size in SIZES] + list(LAYOUTS)
    drawn = [name for name, plan in PLANS.items() if plan.kind in ("bernoulli", "bucket", "fixed")]
    for name in some(drawn, 1, 5):
        for numel, layout in layouts:
            key = int(torch.randint(2**62, (), generator=generator))
            words = words_of(PLANS[name], key, layout, numel, generator)
            keep, _ = keep_and_bucket(PLANS[name], key, 11, layout, numel, words)
            mask = emulated.run("keep_mask", PLANS[name], key, 11, layout, numel, words, CPU)
            assert_same_bits(mask, keep, f"{compiled}, {name}: mask of {numel} elements of {layout}")
    for buckets in some([1, 2, 5, 300, 4096], 1, 3):
        for numel, layout in layouts:
            planes = emulated.run("bucket_planes", seed, buckets, layout, numel, CPU)
            assert_same_bits(planes, cpu.bucket_planes(seed, buckets, layout, numel), f"{buckets} in {layout}")
