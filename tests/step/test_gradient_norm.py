"""sum_of_squares: the gradients as they are, and after the mask, against float64 arithmetic of torch."""

import dataclasses
import math

import pytest
import torch
from batches import DROPPING, LAYOUTS, PLANS, batch_of, copy_of, generator_of
from cases import BF16, F16, F32, F64, ISAS, assert_same_bits, require

from graddrop_kernels import backends
from graddrop_kernels.backends import cpu
from graddrop_kernels.backends.batch import TensorBatch
from graddrop_kernels.backends.reference.step import masked_adamw_
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import keep_and_bucket

SIZES = (0, 1, 3, 15, 17, 33, 63, 65, 1031, 4097)
SHARDS = [(size, RowBlock.whole(size)) for size in SIZES] + [(min(numel, 1301), layout) for numel, layout in LAYOUTS]
SUMS = {backend.name: backend.sum_of_squares for backend in backends.BACKENDS if backend.sum_of_squares}
MODES = (((F32, F32), False), ((BF16, BF16), False), ((F16, F32), False), ((BF16, F32), True), ((F16, F32), True))


def finite(batch: TensorBatch, low: float = -5.0) -> TensorBatch:
    """The batch with gradients of 10^low to 100, 0 in places."""
    for grad in batch.grads:
        sizes = 10 ** (low + (2 - low) * torch.rand(grad.shape))
        grad.copy_(torch.where(torch.rand(grad.shape) < 0.02, 0.0, torch.randn(grad.shape) * sizes))
    return batch


def masked_gradients(batch: TensorBatch) -> list[torch.Tensor]:
    """What the step makes of the gradients, read off the first moment of a step from 0 with beta1 = 0."""
    wide = copy_of(batch)
    wide.param_dtype, wide.moment_dtype, wide.grad_dtype, wide.stochastic, wide.copies = F32, F32, None, False, []
    for name in ("params", "grads"):
        setattr(wide, name, [tensor.float() for tensor in getattr(wide, name)])
    wide.exp_avgs, wide.exp_avg_sqs = ([torch.zeros_like(grad) for grad in wide.grads] for _ in range(2))
    wide.hypers = [dataclasses.replace(hyper, beta1=0.0, maximize=False) for hyper in batch.hypers]
    masked_adamw_(wide, exact=True)
    return wide.exp_avgs


def bound(batch: TensorBatch) -> float:
    """Of the cpu backend's relative error, as csrc/cpu/masked_adamw.cpp has it, and of torch's sum."""
    units = sum(-(-grad.numel() // 4096) for grad in batch.grads)
    return (units + 272 + 64) * 2.0**-53


@pytest.mark.parametrize("dtypes, masters", MODES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
@pytest.mark.parametrize("name", PLANS)
def test_sums_are_those_of_float64(name, masked, dtypes, masters, seed):
    require("cpu")
    offset = list(PLANS).index(name) % 2  # misaligned every other time
    torch.manual_seed(seed)
    batch = batch_of(generator_of(seed, name), [PLANS[name]], dtypes, SHARDS, offset, maximize=True, masters=masters)
    finite(batch)
    gradients = masked_gradients(batch) if masked else batch.grads
    expected = math.fsum(float(g.double().square().sum()) for g in gradients)
    assert (expected == 0) == (masked and name == "off")
    before = copy_of(batch)
    for backend in ("exact", "cpu"):
        total = SUMS[backend](batch, masked)
        assert total.dtype is F64 and total.shape == () and total.device == batch.device
        assert abs(float(total) - expected) <= bound(batch) * expected, backend
    plain = float(SUMS["reference"](batch, masked))
    assert abs(plain - expected) <= 1e-6 * expected  # of Gaussian factors that are rounded otherwise
    for tensors, others in zip((batch.params, batch.grads, batch.steps), (before.params, before.grads, before.steps)):
        for tensor, other in zip(tensors, others):
            assert_same_bits(tensor, other, "a sum changes nothing")


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
def test_rows_of_all_plans_together(masked, seed):
    """Blocks that are dropped, frozen or not, count 0 after the mask and as any other before it."""
    require("cpu")
    plans = [*PLANS.values(), MaskPlan("off", frozen=True)]
    generator = generator_of(seed, "all")
    layouts = [(100 + 37 * i, RowBlock.whole(100 + 37 * i)) for i in range(2 * len(plans))]
    batch = finite(batch_of(generator, plans, (F32, F32), layouts))
    plans = [batch.hypers[row].plan for row in batch.hyper_rows]
    dropped = [plan.kind == "off" and not plan.update for plan in plans]
    moved = masked_gradients(batch) if masked else batch.grads
    expected = math.fsum(
        float(g.double().square().sum()) for g, off in zip(moved, dropped) if not (masked and off)
    )
    assert abs(float(cpu.sum_of_squares(batch, masked)) - expected) <= bound(batch) * expected


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
@pytest.mark.parametrize("name", ["keep", "bernoulli", "gaussian", "buckets", "ages in planes", "fixed"])
def test_threads_and_instruction_sets_give_the_same_bits(name, masked, seed):
    require("cpu")
    layouts = [(size, RowBlock.whole(size)) for size in (33, 150_003, 0, 5, 70_001)] + list(LAYOUTS)
    batch = finite(batch_of(generator_of(seed, name), [PLANS[name]], (F32, F32), layouts), low=-20.0)
    used, totals = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for isa in ISAS:
                with cpu.using_isa(isa):
                    totals[threads, isa] = cpu.sum_of_squares(batch, masked)
    finally:
        torch.set_num_threads(used)
    for how, total in totals.items():
        assert_same_bits(total, totals[1, "portable"], f"{how}")
    assert total > 0


@pytest.mark.parametrize("name", DROPPING)
def test_what_a_mask_drops_does_not_count(name, seed):
    """Infinities and NaN among dropped gradients; one among the kept ones makes the sum infinite or NaN."""
    plan = PLANS[name]
    require("cpu")
    torch.manual_seed(seed)
    clean = finite(batch_of(generator_of(seed, name), [plan], (F32, F32), SHARDS))
    bad, last = copy_of(clean), None
    for row, grad in enumerate(bad.grads):
        keep, _ = keep_and_bucket(
            plan, bad.keys[row], int(bad.steps[row]), bad.layouts[row], grad.numel(), bad.mask_words[row]
        )
        keep = torch.zeros_like(grad, dtype=torch.bool) if keep is None else keep
        grad[~keep] = torch.tensor([math.inf, -math.inf, math.nan])[torch.randint(3, grad.shape)][~keep]
        if keep.any():
            last = grad, int(keep.nonzero()[-1])
    poisoned = any(not grad.isfinite().all() for grad in bad.grads)
    assert poisoned or name.startswith("one bucket")
    for isa in ISAS:
        with cpu.using_isa(isa):
            assert_same_bits(cpu.sum_of_squares(bad, True), cpu.sum_of_squares(clean, True), isa)
            assert cpu.sum_of_squares(bad, False).isfinite() != poisoned
    assert_same_bits(SUMS["exact"](bad, True), SUMS["exact"](clean, True))
    if last is not None:
        for value in (math.inf, math.nan):
            last[0][last[1]] = value
            assert not SUMS["exact"](bad, True).isfinite() and not cpu.sum_of_squares(bad, True).isfinite()


def test_squares_that_float32_has_no_room_for(seed, isa):
    """float64 from the squares on: 1e30^2 and 1e-30^2."""
    for value in (1e30, 1e-30, 1e-42):
        batch = batch_of(generator_of(seed, value), [MaskPlan("keep")], (F32, F32), [(1001, RowBlock.whole(1001))])
        batch.grads[0].fill_(value)
        expected = 1001 * float(batch.grads[0][0].double().square())
        assert math.isclose(float(cpu.sum_of_squares(batch, True)), expected, rel_tol=1e-13)


def test_float64_gradients_in_the_reference(seed):
    batch = finite(batch_of(generator_of(seed), [PLANS["bernoulli"]], (F64, F64), SHARDS))
    expected = math.fsum(float(g.square().sum()) for g in batch.grads)
    assert math.isclose(float(SUMS["reference"](batch, False)), expected, rel_tol=1e-13)
    assert 0 < SUMS["reference"](batch, True) != expected
