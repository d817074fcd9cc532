"""The triton backend alone: what the tables of cases do not reach. On a GPU, or in Triton's interpreter, where
test_triton_interpreter.py runs this file.
"""

import dataclasses
import math

import pytest
import torch
from cases import BF16, EXACT, F16, F32, Engine, assert_same_bits

from graddrop_kernels import FusedGradDropAdamW, GradDrop, backends
from graddrop_kernels.backends import triton
from graddrop_kernels.backends.batch import ROUND_MOMENTS, ROUND_PARAMS, Hyper, TensorBatch
from graddrop_kernels.masks import bitmask
from graddrop_kernels.masks.philox import stream_key
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import by_runs, keep_and_bucket

pytestmark = pytest.mark.skipif(
    triton.unavailable() is not None, reason=f"{triton.unavailable()} (test_triton_interpreter.py runs it there)"
)
TRITON = Engine("triton")
KEEP = MaskPlan("keep")
PLANS = {
    "keep": KEEP,
    "off": MaskPlan("off"),
    "bernoulli": MaskPlan("bernoulli", threshold=30_000, scale=65536 / 35536),
    "gaussian": MaskPlan("gaussian", scale=0.5),
    "buckets": MaskPlan("bucket", buckets=5, first_bucket=1, last_bucket=3),
    "buckets by age": MaskPlan("bucket", frozen=True, buckets=70, last_bucket=40, ages=tuple(range(41, 0, -1))),
    "planes": MaskPlan("bucket", frozen=True, buckets=5, last_bucket=2, bitpacked=True, ages=(3, 2, 1)),
    "fixed": MaskPlan("fixed", frozen=True, scale=2.0),
}
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F16)]


def one_batch(
    seed: int, dtypes, layouts, plans, rows, key: int = 99, copies=None, stochastic: int = 0
) -> TensorBatch:
    """One tensor a (layout, numel), with hyper row ``rows[i]``; the same values for the same arguments.

    ``copies``: the dtype of the parameters that master weights are kept of. They are not those rounded, so that it
    shows which are written.
    """
    generator = torch.Generator().manual_seed(seed)
    device = torch.device(TRITON.device)
    batch = TensorBatch(device, *dtypes, grad_dtype=copies, stochastic=stochastic)
    batch.hypers = [
        Hyper(3e-2 / (i + 1), 0.8, 0.95, 1e-3, 0.1 * i, True, i % 2 == 1, plan) for i, plan in enumerate(plans)
    ]
    for (layout, numel), row in zip(layouts, rows):
        new = lambda dtype, numel=numel: torch.randn(numel, generator=generator).to(dtype).to(device)
        batch.params.append(new(dtypes[0]))
        batch.grads.append(new(copies or dtypes[0]))
        if copies:
            batch.copies.append(new(copies))
        batch.exp_avgs.append(new(dtypes[1]))
        batch.exp_avg_sqs.append(new(dtypes[1]).abs())
        batch.max_exp_avg_sqs.append(new(dtypes[1]).abs())
        batch.steps.append(torch.tensor(4.0, device=device))
        batch.keys.append(key)
        batch.layouts.append(layout)
        batch.hyper_rows.append(row)
        plan, words = plans[row], None
        if plan.kind == "fixed":
            words = bitmask.pack(torch.rand(numel, generator=generator) < 0.4).to(device)
        elif plan.bitpacked:
            words = backends.bucket_planes(key, plan.buckets, layout, numel, device)
        batch.mask_words.append(words)
    return batch


def step(batch: TensorBatch, engine: Engine) -> dict[str, torch.Tensor]:
    backends.select(engine.backend, batch.device, batch.param_dtype, batch.moment_dtype).masked_adamw_(batch)
    lists = {"param": batch.params, "exp_avg": batch.exp_avgs, "exp_avg_sq": batch.exp_avg_sqs,
             "max_exp_avg_sq": batch.max_exp_avg_sqs, "step": batch.steps, "grad": batch.grads,
             "copy": batch.copies}  # fmt: skip
    return {f"{name} {i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}


def assert_as_exact(*arguments, change=lambda batch: None, **options) -> TensorBatch:
    """Steps two equal batches, one by each, after ``change`` to both; returns that of triton."""
    mine, expected = one_batch(*arguments, **options), one_batch(*arguments, **options)
    change(mine), change(expected)
    stepped = step(mine, TRITON)
    for name, tensor in step(expected, EXACT).items():
        assert_same_bits(stepped[name], tensor, name, any_nan=True)
    return mine


def shards() -> list[tuple[RowBlock, int]]:
    """Whole tensors and shards whose rows are whole Philox calls, beside some that are not; each with a last block."""
    return [
        (RowBlock.whole(1000), 1000), (RowBlock(8, 24, 64), 24 * 50), (RowBlock(2**35 + 64, 64, 4096), 64 * 21),
        (RowBlock(3, 17, 29), 17 * 9), (RowBlock(5, 77, 77), 77),
    ]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_columns_in_eights_take_the_wide_path(plan, dtypes, seed):
    """Shards whose rows are whole Philox calls, beside some that are not."""
    layouts = [(RowBlock(8, 24, 64), 24 * 50), (RowBlock(2**35 + 64, 64, 4096), 64 * 21), (RowBlock(3, 17, 29), 17 * 9)]
    batch = assert_as_exact(seed, dtypes, layouts, [PLANS[plan]], [0, 0, 0])
    assert {(launch.aligned, launch.rows) for launch in batch.table.launches} == {(True, True), (False, True)}


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("plan", [name for name in PLANS if name not in ("keep", "off", "planes", "fixed")])
def test_rows_with_other_hyper_parameters_share_a_launch(plan, dtypes, seed):
    """Masked rows, rows that keep everything, rows of other hyper-parameters: one launch."""
    whole = [(RowBlock.whole(numel), numel) for numel in (1000, 1, 64, 777, 0, 9)]
    batch = assert_as_exact(seed, dtypes, whole, [PLANS[plan], KEEP, PLANS[plan]], [0, 1, 2, 1, 0, 2])
    assert len(batch.table.launches) == 1


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F32)], ids=str)
@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_gradients_are_unscaled_in_the_kernel(dtypes, scale, seed):
    """Divided in float32 and used so; written back rounded to the gradient's dtype."""
    sizes = [(RowBlock.whole(numel), numel) for numel in (1000, 13, 99)]
    arguments = (seed, dtypes, sizes, [PLANS["bernoulli"], PLANS["off"]], [0, 0, 1])
    batch, expected = one_batch(*arguments), one_batch(*arguments)
    written = [(grad.float() / scale).to(grad.dtype) for grad in batch.grads]
    batch.grad_scale = expected.grad_scale = torch.tensor(scale, device=batch.device)
    stepped = step(batch, TRITON)
    for name, tensor in step(expected, EXACT).items():
        assert_same_bits(stepped[name], tensor, name)
    for i, grad in enumerate(written):
        assert_same_bits(stepped[f"grad {i}"], grad, "the gradient")


@pytest.mark.parametrize("factor, scale", [(0.37, None), (0.37, 3.0), (math.nan, None)])
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_clipped_in_registers(plan, scale, factor, seed):
    """Multiplied in float32 before the mask and its scale, after they have been unscaled; not written back. What is
    dropped counts as 0 whatever the factor.
    """
    dtypes = DTYPES[seed % 3]

    def clip(batch):
        batch.clip_factor = torch.tensor(factor, device=batch.device)
        batch.grad_scale = scale and torch.tensor(scale, device=batch.device)

    before = one_batch(seed, dtypes, shards(), [PLANS[plan]], [0] * 5)
    batch = assert_as_exact(seed, dtypes, shards(), [PLANS[plan]], [0] * 5, change=clip)
    for grad, given in zip(batch.grads, before.grads):
        assert_same_bits(grad, (given.float() / scale).to(given.dtype) if scale else given, "the gradient")


@pytest.mark.parametrize("copies", [BF16, F16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_master_weights_and_their_copies(plan, copies, seed):
    """The masters are stepped with gradients of 16 bits, and their copies are what they round to; frozen elements of
    both stay.
    """
    layouts, plan = shards(), PLANS[plan]
    before = one_batch(seed, (F32, F32), layouts, [plan], [0] * 5, copies=copies)
    batch = assert_as_exact(seed, (F32, F32), layouts, [plan], [0] * 5, copies=copies)
    for master, copy, old in zip(batch.params, batch.copies, before.copies):
        rounded = copy == master.to(copies)
        assert rounded.any() and (plan.frozen or rounded.all())
        assert torch.equal(rounded | (copy == old), torch.ones_like(rounded))


@pytest.mark.parametrize("dtypes, stochastic", [
    ((BF16, BF16), ROUND_PARAMS), ((BF16, F32), ROUND_PARAMS), ((F32, BF16), ROUND_MOMENTS),
    ((BF16, BF16), ROUND_PARAMS | ROUND_MOMENTS),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("plan", [*PLANS, "another draw"])
def test_what_is_bfloat16_is_rounded_at_random(plan, dtypes, stochastic, seed):
    """By the completed steps, not by the mask's draw; infinities, NaN and numbers on the edge among them."""
    plan = PLANS.get(plan) or MaskPlan("bernoulli", threshold=30_000, scale=65536 / 35536, draw=2**32 + 3)

    def count(batch):
        for i, steps in enumerate((0, 1, 77, 2**16 + 5, 2**24 - 1)):
            batch.steps[i].fill_(steps)
            edge = torch.tensor([math.inf, -math.inf, math.nan, 3.38e38, -3.38e38, 1e-39, 0.0])
            batch.params[i][:7] = edge.to(batch.device)
            batch.grads[i][5:9] = math.nan
            if dtypes[1] == F32:  # the NaN of a GPU: a random number added to its bits makes it -0
                batch.exp_avgs[i].view(torch.int32)[9:12] = 0x7FFFFFFF

    arguments = (seed, dtypes, shards(), [plan, KEEP], [0, 0, 1, 0, 0])
    batch = assert_as_exact(*arguments, change=count, stochastic=stochastic)
    usual = one_batch(*arguments)
    count(usual)
    step(usual, TRITON)
    for bit, names in ((ROUND_PARAMS, ["params"]), (ROUND_MOMENTS, ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])):
        for name in names if stochastic & bit else ():
            differ = torch.cat(getattr(batch, name)) != torch.cat(getattr(usual, name))
            # A maximum that a step does not raise is a bfloat16 already.
            assert 0.05 < differ.float().mean() < 0.6 or plan.frozen, f"{name}: half of those that move differ"


def test_a_mask_and_the_rounding_are_drawn_from_streams_of_their_own(seed):
    """Rows that keep everything share a launch with masked rows of any kind, and are rounded by their own steps."""
    for plan in (PLANS["gaussian"], PLANS["bernoulli"], PLANS["buckets"]):
        whole = [(RowBlock.whole(numel), numel) for numel in (1000, 1, 64, 777, 0, 9)]
        arguments = (seed, (BF16, F32), whole, [plan, KEEP, plan], [0, 1, 2, 1, 0, 2])
        assert len(assert_as_exact(*arguments, stochastic=ROUND_PARAMS).table.launches) == 1


@pytest.mark.parametrize("options", [{"copies": BF16}, {"stochastic": ROUND_PARAMS}], ids=str)
def test_whole_blocks_and_the_rest(options, seed):
    """In the interpreter a block is of 65536 elements."""
    long = [(RowBlock.whole(70_001), 70_001)]
    dtypes = (BF16, F32) if "stochastic" in options else (F32, F32)

    def clip(batch):
        batch.clip_factor = torch.tensor(0.3, device=batch.device)

    for plan in (PLANS["bernoulli"], PLANS["fixed"]):
        assert_as_exact(seed, dtypes, long, [plan], [0], change=clip, **options)


@pytest.mark.parametrize("found", [1.0, 2.0, math.nan])
def test_found_inf_makes_the_step_a_no_op(found, seed):
    arguments = (seed, (F32, F32), [(RowBlock.whole(99), 99)], [PLANS["buckets by age"]], [0])
    batch, untouched = one_batch(*arguments), one_batch(*arguments)
    batch.grad_scale = torch.tensor(2.0, device=batch.device)
    batch.found_inf = torch.tensor(found, device=batch.device)
    after = step(batch, TRITON)
    assert_same_bits(after["step 0"], untouched.steps[0], "step")
    for name, tensors in (("param", untouched.params), ("exp_avg", untouched.exp_avgs), ("grad", untouched.grads)):
        assert_same_bits(after[f"{name} 0"], tensors[0], name)
    batch.found_inf.zero_()
    assert (step(batch, TRITON)["param 0"] != untouched.params[0]).any() and batch.steps[0] == 5


def test_ages_of_another_epoch_and_of_another_group_do_not_linger(seed):
    """The table by age is written by every step for every tensor."""
    sizes = [(RowBlock.whole(500), 500)] * 2
    arguments = (seed, (F32, F32), sizes, [PLANS["buckets by age"], PLANS["buckets"]], [0, 1])
    mine, expected = one_batch(*arguments), one_batch(*arguments)
    for _ in range(3):
        stepped = step(mine, TRITON)
        for name, tensor in step(expected, EXACT).items():
            assert_same_bits(stepped[name], tensor, name)
        for batch in (mine, expected):
            batch.hypers.reverse()


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16], ids=str)
def test_a_number_in_a_tensor_on_the_device(dtype, name, seed):
    """Read at every step anew, for tensors with ages and without; another dtype is taken by its value. A decay of 0
    leaves infinite weights alone, one that is 0 in float32 only does not.
    """
    sizes = [(RowBlock.whole(500), 500)] * 2
    arguments = (seed, (F32, F32), sizes, [PLANS["buckets by age"], PLANS["bernoulli"]], [0, 1])
    mine, expected = one_batch(*arguments), one_batch(*arguments)
    number = torch.tensor(0.1, dtype=dtype, device=mine.device)
    mine.hypers = [dataclasses.replace(hyper, **{name: number}) for hyper in mine.hypers]
    for value in (0.1, 0.03, 0.0, 1e-300):
        number.fill_(value)
        for batch in (mine, expected):
            for param in batch.params:
                param[:9] = torch.inf
        expected.hypers = [dataclasses.replace(hyper, **{name: number.item()}) for hyper in expected.hypers]
        stepped = step(mine, TRITON)
        for what, tensor in step(expected, EXACT).items():
            assert_same_bits(stepped[what], tensor, what, any_nan=True)


# --- the norm ---------------------------------------------------------------------------------------------------------


def squares(batch: TensorBatch, masked: bool) -> torch.Tensor:
    found = backends.select("triton", batch.device, batch.param_dtype, batch.moment_dtype).sum_of_squares(batch, masked)
    assert (found.shape, found.dtype, found.device.type) == ((), torch.float64, batch.device.type)
    return found.cpu()


def sum_of(tensors) -> torch.Tensor:
    return sum(tensor.double().square().sum() for tensor in tensors).cpu()


@pytest.mark.parametrize("grads", [F32, BF16], ids=str)
@pytest.mark.parametrize("plan", [*PLANS, "frozen block"])
def test_the_sum_of_squares_of_masked_gradients(plan, grads, seed):
    """With beta1 = 0 the first moment is the masked gradient. Rows that keep everything are among them, and nothing
    moves: the step after it is the one without it.
    """
    plan = PLANS.get(plan) or MaskPlan("off", frozen=True)
    arguments = (seed, (grads, F32), [*shards(), (RowBlock.whole(1), 0)], [plan, KEEP], [0, 0, 1, 0, 0, 0])
    mine, expected, untouched = one_batch(*arguments), one_batch(*arguments), one_batch(*arguments)
    for batch in (mine, expected):
        batch.grad_scale = torch.tensor(3.0, device=batch.device)  # neither is in the sum
        batch.clip_factor = torch.tensor(0.3, device=batch.device)
    given = [grad.float() for grad in mine.grads]
    torch.testing.assert_close(squares(mine, False), sum_of(given), rtol=1e-12, atol=0)
    found = squares(mine, True)
    for name in ("params", "exp_avgs", "steps"):
        for tensor, before in zip(getattr(mine, name), getattr(untouched, name)):
            assert_same_bits(tensor, before, name)

    bare = one_batch(*arguments)
    bare.grads = [grad.clone() for grad in mine.grads]
    bare.hypers = [dataclasses.replace(hyper, beta1=0.0) for hyper in bare.hypers]
    for moment in bare.exp_avgs:
        moment.zero_()
    step(bare, EXACT)
    torch.testing.assert_close(found, sum_of(bare.exp_avgs), rtol=1e-12, atol=0)

    stepped = step(mine, TRITON)
    for name, tensor in step(expected, EXACT).items():
        assert_same_bits(stepped[name], tensor, name)
    if plan.kind in ("bernoulli", "gaussian"):
        assert squares(mine, True) != found, "the next step has another mask"


@pytest.mark.parametrize("masked", [False, True])
def test_the_order_in_which_programs_run_does_not_show(masked, seed, monkeypatch):
    """One program a launch, in any order: the same bits."""
    from graddrop_kernels.backends.triton import norm as triton_norm

    sizes = [(RowBlock.whole(numel), numel) for numel in (70_001, 1, 64, 777, 0, 9, 1000)]
    plans, rows = [PLANS["bernoulli"], PLANS["fixed"]], [0, 1, 0, 0, 1, 0, 1]
    batch = one_batch(seed, (F32, F32), sizes, plans, rows)
    grads = batch.grads
    if masked:
        kept = [keep_and_bucket(plans[row], 99, 4, *size, words, TRITON.device)[0]
                for row, size, words in zip(rows, sizes, batch.mask_words)]  # fmt: skip
        grads = [keep * (grad * plans[row].scale) for keep, grad, row in zip(kept, grads, rows)]
    expected, kernel = squares(batch, masked), triton_norm.sum_of_squares_kernel
    torch.testing.assert_close(expected, sum_of(grads), rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(seed)

    class OneByOne:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: pending.extend((i, arguments, constants) for i in range(*grid))

    for _ in range(3):
        pending = []
        with monkeypatch.context() as patch:
            patch.setattr(triton_norm, "sum_of_squares_kernel", OneByOne())
            out = triton_norm.sum_of_squares(batch, masked).fill_(math.nan)
        assert len(pending) == (7 if TRITON.device == "cpu" else 23)
        for i in torch.randperm(len(pending), generator=generator).tolist():
            place, (rows, step_rows, chunks, *given, first, total), constants = pending[i]
            assert out.isnan(), "before the last program has run"
            kernel[(1,)](rows, step_rows, chunks[place : place + 1], *given, first + place, total, **constants)
        assert_same_bits(out, expected, "sum of squares")


def test_no_elements_have_no_squares(seed):
    for sizes, plan in (([(RowBlock.whole(1), 0)], KEEP), ([(RowBlock.whole(9), 9)], MaskPlan("off", frozen=True))):
        assert squares(one_batch(seed, (F32, F32), sizes, [plan], [0]), True) == 0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_gradient_shows_in_the_sum_unless_it_is_dropped(value, seed):
    batch = one_batch(seed, (F32, F32), [(RowBlock.whole(99), 99)] * 2, [PLANS["bernoulli"], PLANS["off"]], [0, 1])
    keep, _ = keep_and_bucket(PLANS["bernoulli"], 99, 4, RowBlock.whole(99), 99)
    batch.grads[0][~keep] = value
    batch.grads[1].fill_(value)
    assert squares(batch, True).isfinite() and not squares(batch, False).isfinite()
    batch.grads[0].fill_(value)
    assert not squares(batch, True).isfinite()
    batch.grads[0].fill_(2.0**100)  # its square is beyond float32
    expected = 2.0**200 * PLANS["bernoulli"].scale ** 2 * keep.sum().item()
    assert math.isclose(squares(batch, True), expected, rel_tol=1e-6)


# --- masks by themselves ----------------------------------------------------------------------------------------------

LAYOUTS = [
    (RowBlock.whole(70_001), 70_001), (RowBlock(3, 17, 29), 17 * 9), (RowBlock(8, 24, 64), 24 * 50),
    (RowBlock(2**38 + 8, 32, 32), 32), (RowBlock.whole(1), 1), (RowBlock.whole(1), 0),
]  # fmt: skip


@pytest.mark.parametrize("layout, numel", LAYOUTS, ids=str)
@pytest.mark.parametrize("plan", ["bernoulli", "buckets", "planes", "fixed"])
def test_masks_are_written(plan, layout, numel, seed):
    plan, key = PLANS[plan], stream_key("w", seed)
    device, words = torch.device(TRITON.device), None
    if plan.kind == "fixed":
        words = bitmask.pack(torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.4)
    elif plan.bitpacked:
        words = bitmask.pack_buckets(drawn_buckets(key, plan.buckets, layout, numel), plan.buckets)
    expected, _ = keep_and_bucket(plan, key, 2**32 + 7, layout, numel, words)
    arguments = (plan, key, 2**32 + 7, layout, numel, None if words is None else words.to(device), device)
    assert_same_bits(triton.keep_mask(*arguments), expected, "mask")


def drawn_buckets(key: int, buckets: int, layout: RowBlock, numel: int) -> torch.Tensor:
    return by_runs(layout, numel, None, lambda *run: bitmask.element_buckets(key, buckets, *run))


@pytest.mark.parametrize("buckets", [1, 2, 5, 64, 4096])
def test_bucket_planes(buckets, seed):
    key, device = stream_key("w", seed), torch.device(TRITON.device)
    for layout, numel in LAYOUTS[1:]:
        expected = bitmask.pack_buckets(drawn_buckets(key, buckets, layout, numel), buckets)
        assert_same_bits(triton.bucket_planes(key, buckets, layout, numel, device), expected, str(layout))


def test_the_optimizers_masks_are_made_by_the_kernels(seed, monkeypatch):
    from graddrop_kernels.backends.triton import masks as triton_masks

    param = torch.nn.Parameter(torch.zeros(7, 9, device=TRITON.device))
    optimizer = FusedGradDropAdamW([("w", param)], mask=GradDrop(0.3), seed=seed)
    calls, kernel = [], triton_masks.keep_mask
    monkeypatch.setattr(triton_masks, "keep_mask", lambda *args: calls.append(1) or kernel(*args))
    threshold = round(0.3 * 65536)
    plan = MaskPlan("bernoulli", threshold=threshold, scale=65536 / (65536 - threshold))
    expected, _ = keep_and_bucket(plan, stream_key("w", seed), 5, RowBlock.whole(63), 63)
    assert_same_bits(optimizer.mask("w", step=5), expected.view(7, 9), "mask")
    assert calls == [1]
