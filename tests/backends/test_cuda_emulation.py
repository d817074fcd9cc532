"""The CUDA kernels' text, run by the host thread after thread: the bits of the cpu backend and of "exact".

What it leaves unproved is the hardware: the shuffle between two lanes, the accesses of 16 bytes, and that the device's
pow() rounds to the same float32 as the host's.
"""

import ctypes
import dataclasses
import math
import re
import subprocess
import sys
from unittest import mock

import cases
import pytest
import torch
from batches import (
    CHUNK,
    DROPPING,
    LAYOUTS,
    LISTS,
    OF_GRADIENTS,
    PLANS,
    SIZES,
    assert_same_batches,
    batch_of,
    copy_of,
    generator_of,
    words_of,
)
from cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    HYPERS,
    MASKINGS,
    MODES,
    PAST_THE_LAST_EPOCH,
    Case,
    Engine,
    assert_same_bits,
    require,
)
from test_gradient_norm import finite, masked_gradients

from graddrop_kernels import FusedGradDropAdamW, GradDrop, backends
from graddrop_kernels.backends import cpu, cuda
from graddrop_kernels.backends.batch import TensorBatch
from graddrop_kernels.backends.reference.step import masked_adamw_
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import keep_and_bucket

pytestmark = [
    pytest.mark.skipif(not cuda._LIBRARY.exists(), reason="_cuda.so was not built; make test does so where nvcc is"),
    pytest.mark.filterwarnings(PAST_THE_LAST_EPOCH),
]

# (maximize, weight decay) in turn with the plans, so that every variant meets each
SIGNS = ((False, 0.1), (True, 0.1), (False, 0.0), (True, 0.0))


def compare_with_cpu(batch: TensorBatch, what: str, steps: int = 2) -> None:
    require("cpu")
    expected, before = copy_of(batch), copy_of(batch)
    for step in range(steps):
        cuda.masked_adamw_(batch)
        cpu.masked_adamw_(expected)
        assert_same_batches(batch, expected, f"{what}, step {step}")
    moved = any(not torch.equal(a, b) for a, b in zip(batch.exp_avgs, before.exp_avgs) if a.numel())
    assert moved, f"{what}: nothing was updated"


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("name", PLANS)
def test_bits_of_the_cpu_backend(name, dtypes, offset, amsgrad, seed):
    place = list(PLANS).index(name) + DTYPES.index(dtypes)
    maximize, decay = SIGNS[place % len(SIGNS)]
    layouts = [(size, RowBlock.whole(size)) for size in SIZES]
    batch = batch_of(generator_of(seed, name, dtypes), [PLANS[name]], dtypes, layouts, offset, amsgrad, maximize, decay)
    compare_with_cpu(batch, name)
    assert {launch.aligned for launch in batch.table.launches} == {offset == 0}


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=lambda pair: str(pair[1])[6:])
@pytest.mark.parametrize("name", [name for name in PLANS if name != "off"])
def test_bits_of_the_cpu_backend_for_shards(name, dtypes, seed):
    batch = batch_of(generator_of(seed, name), [PLANS[name]], dtypes, LAYOUTS)
    compare_with_cpu(batch, name)
    if PLANS[name].kind != "keep":
        assert {launch.aligned for launch in batch.table.launches} == {True, False}


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtypes, masters, stochastic", MODES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bits_of_the_cpu_backend_in_every_mode(name, dtypes, masters, stochastic, offset, seed):
    """Whole tensors and shards; in turn with amsgrad, a clip factor and gradients to be unscaled."""
    place = list(PLANS).index(name) + [mode[0] for mode in MODES].index(dtypes)
    layouts = [(size, RowBlock.whole(size)) for size in (1, 5, 33, CHUNK - 1, CHUNK + 8, 2 * CHUNK)] + list(LAYOUTS)
    maximize, decay = SIGNS[place % len(SIGNS)]
    batch = batch_of(
        generator_of(seed, name, dtypes), [PLANS[name]], dtypes, layouts, offset, place % 3 == 0, maximize, decay,
        masters, stochastic,
    )  # fmt: skip
    batch.clip_factor = torch.tensor(0.37) if place % 2 else None
    batch.grad_scale = torch.tensor(5.3) if place % 5 == 0 else None
    compare_with_cpu(batch, name)
    assert {launch.aligned for launch in batch.table.launches} == ({False} if offset else {True, False})


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("scale", [None, 3.7])
@pytest.mark.parametrize("clip", [0.3, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", PLANS)
def test_clip_factors(name, clip, scale, offset, seed):
    layouts = [(size, RowBlock.whole(size)) for size in (5, 33, CHUNK + 13)]
    batch = batch_of(generator_of(seed, name), [PLANS[name]], (F32, F32), layouts, offset)
    batch.clip_factor, batch.grad_scale = torch.tensor(clip), None if scale is None else torch.tensor(scale)
    compare_with_cpu(batch, name)


@pytest.mark.parametrize("name", ["bernoulli", "bernoulli frozen", "gaussian", "buckets", "ages", "fixed frozen"])
def test_rows_that_keep_or_drop_everything_share_a_launch(name, seed):
    layouts = [(size, RowBlock.whole(size)) for size in (33, 5000, 4096, 0, 70, 8200)]
    plans = [PLANS[name], MaskPlan("keep"), MaskPlan("off"), MaskPlan("off", frozen=True)]
    batch = batch_of(generator_of(seed, name), plans, (F32, F32), [*layouts, *layouts], maximize=True)
    compare_with_cpu(batch, name)


@pytest.fixture
def emulation(monkeypatch) -> str:
    """A name that the optimizer takes for a backend: the emulation, on CPU tensors."""
    row = backends.Backend(
        "cuda-emulation", "", ("cpu",), backends._FUSED_DTYPES, False, lambda: None, cuda.masked_adamw_,
        cuda.sum_of_squares, cuda.mask_gradients_,
    )  # fmt: skip
    monkeypatch.setitem(backends._BY_NAME, row.name, row)
    monkeypatch.setitem(cases._ROWS, row.name, row)
    return row.name


@pytest.mark.parametrize("mode", [False, True], ids=["plain", "mode"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_policies_have_the_exact_bits(masking, mode, emulation, seed):
    """Whole trainings over several epochs, through the optimizer."""
    place = list(MASKINGS).index(masking)
    modes = MODES if mode else [(dtypes, False, False) for dtypes in DTYPES]
    dtypes, masters, stochastic = modes[place % len(modes)]
    hyper = list(HYPERS)[place // len(modes) % len(HYPERS)]
    sizes = (0, 1, 3, 33, 1031, CHUNK + 1)
    Case.of(masking, hyper, dtypes, sizes, masters, stochastic, steps=6, start=3).run(seed, [Engine(emulation)])


# --- loss scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F32)], ids=lambda pair: str(pair[0])[6:])
@pytest.mark.parametrize("name", ["keep", "bernoulli", "bernoulli frozen", "ages", "fixed frozen", "gaussian"])
def test_gradients_are_divided_by_the_scale_and_written_back(name, dtypes, offset, seed):
    """The update sees the quotient in float32, the gradient has it rounded; also where an element is dropped."""
    layouts = [(size, RowBlock.whole(size)) for size in SIZES[:-1]]
    batch = batch_of(generator_of(seed, name), [PLANS[name]], dtypes, layouts, offset, maximize=True)
    scale = torch.tensor(3.7)
    wide = copy_of(batch)  # the same in float32, with the quotients for gradients
    wide.param_dtype = F32
    wide.params = [tensor.float() for tensor in batch.params]
    wide.grads = [tensor.float() / scale for tensor in batch.grads]
    quotients = [tensor.to(dtypes[0]) for tensor in wide.grads]
    batch.grad_scale = scale
    before = [tensor.clone() for tensor in batch.params]
    cuda.masked_adamw_(batch)
    masked_adamw_(wide, exact=True)
    for i, (param, expected) in enumerate(zip(batch.params, wide.params)):
        assert_same_bits(batch.grads[i], quotients[i], f"gradient {i}", any_nan=True)
        assert_same_bits(param, expected.to(dtypes[0]), f"parameter {i}", any_nan=True)
        assert_same_bits(batch.exp_avgs[i], wide.exp_avgs[i], f"exp_avg {i}", any_nan=True)
    assert not all(torch.equal(a, b) for a, b in zip(before, batch.params) if a.numel())


@pytest.mark.parametrize("found", [1.0, 2.0, float("inf"), float("nan")])
def test_found_inf_makes_the_step_a_no_op(found, seed):
    layouts = [(size, RowBlock.whole(size)) for size in SIZES[:-1]]
    for offset in (0, 1):
        batch = batch_of(generator_of(seed), [PLANS["bernoulli"]], (F32, F32), layouts, offset)
        before = copy_of(batch)
        batch.grad_scale, batch.found_inf = torch.tensor(8.0), torch.tensor(found)
        cuda.masked_adamw_(batch)
        assert_same_batches(batch, before, f"found_inf {found}")
        batch.found_inf = torch.tensor(0.0)
        cuda.masked_adamw_(batch)
        assert [int(step) for step in batch.steps] == [int(step) + 1 for step in before.steps]


# --- 16-bit values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_values_are_read_and_rounded_to_nearest_even(dtype, offset, seed):
    """Every bit pattern as a gradient, and with beta1 = 0.5 halves between two numbers, which are ties."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = patterns[torch.randperm(2**16, generator=generator_of(seed))]
    batch = batch_of(generator_of(seed), [MaskPlan("keep")], (dtype, dtype), [(2**16, RowBlock.whole(2**16))], offset)
    for beta1 in (0.0, 0.5):
        batch.hypers = [dataclasses.replace(batch.hypers[0], beta1=beta1)]
        batch.grads[0].copy_(patterns)
        batch.exp_avgs[0].copy_(shuffled)
        finite = patterns.isfinite() & shuffled.isfinite()
        expected = (patterns.float() * (1 - beta1) + shuffled.float() * beta1).to(dtype)
        cuda.masked_adamw_(batch)
        assert_same_bits(batch.exp_avgs[0][finite] + 0.0, expected[finite] + 0.0, f"exp_avg with beta1={beta1}")
        assert batch.exp_avgs[0][patterns.isnan()].isnan().all()


# --- the norm ---------------------------------------------------------------------------------------------------------


def exact_sum(tensors) -> float:
    """Of the squares, rounded once: those of float32 are exact in float64."""
    return math.fsum(square for tensor in tensors for square in tensor.double().square().flatten().tolist())


def chunks_of(batch: TensorBatch, masked: bool) -> int:
    return sum(launch.chunks.numel() for launch in batch.table.launches_of_norm(masked))


def assert_sum(batch: TensorBatch, masked: bool, expected: float, what: str = "") -> None:
    """Within the bound of csrc/cuda/norm.cu, and with the same bits a second time."""
    total = cuda.sum_of_squares(batch, masked)
    assert total.dtype is torch.float64 and total.shape == () and total.device == batch.device
    bound = (78 + math.ceil(chunks_of(batch, masked) / 256) + 1) * 2.0**-53
    assert abs(float(total) - expected) <= bound * expected, what
    assert_same_bits(cuda.sum_of_squares(batch, masked), total, "a second time")
    assert batch.table.arrived == 0


# (dtypes, master weights, stochastic rounding): every dtype of gradients, beside parameters of each kind
SUMMED = (((F32, F32), False, False), ((BF16, BF16), False, True), ((F16, F32), True, False))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtypes, masters, stochastic", SUMMED, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
@pytest.mark.parametrize("name", PLANS)
def test_sums_of_squares_are_those_of_float64(name, masked, dtypes, masters, stochastic, offset, seed):
    """Whole tensors and shards; nothing changes, so that the step after it is the one without it."""
    torch.manual_seed(seed)
    sizes = (0, 1, 3, 7, 8, 33, CHUNK - 1, 2 * CHUNK + 13)
    layouts = [(size, RowBlock.whole(size)) for size in sizes] + list(LAYOUTS)
    amsgrad, maximize = list(PLANS).index(name) % 3 == 0, list(PLANS).index(name) % 2 == 0
    batch = finite(batch_of(
        generator_of(seed, name, dtypes), [PLANS[name]], dtypes, layouts, offset, amsgrad, maximize, 0.1, masters,
        stochastic,
    ))  # fmt: skip
    expected = exact_sum(masked_gradients(batch) if masked else batch.grads)
    assert (expected == 0) == (masked and name == "off")
    without = copy_of(batch)
    batch.grad_scale, batch.clip_factor = torch.tensor(5.3), torch.tensor(0.37)  # neither is in it
    assert_sum(batch, masked, expected)
    assert_same_batches(batch, without, "the sum changes nothing")
    batch.grad_scale = batch.clip_factor = None
    cuda.masked_adamw_(batch)
    cuda.masked_adamw_(without)
    assert_same_batches(batch, without, "the step after it")
    drawn = name in OF_GRADIENTS and PLANS[name].kind in ("bernoulli", "gaussian") and PLANS[name].draw is None
    if masked and drawn:
        assert_sum(batch, True, exact_sum(masked_gradients(batch)), "the next step has another mask")
        assert cuda.sum_of_squares(batch, True) != expected


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
def test_sums_of_squares_of_all_plans_together(masked, offset, seed):
    """Several launches of one batch. Blocks that are dropped, frozen or not, count 0 after the mask, and as any other
    before it.
    """
    torch.manual_seed(seed)
    plans = [*PLANS.values(), MaskPlan("off", frozen=True)]
    layouts = [(100 + 337 * i, RowBlock.whole(100 + 337 * i)) for i in range(2 * len(plans))]
    batch = finite(batch_of(generator_of(seed, masked), plans, (F32, F32), layouts, offset))
    frozen = [plans[row].kind == "off" and plans[row].frozen for row in batch.hyper_rows]
    grads = batch.grads
    if masked:
        grads = [g for g, off in zip(masked_gradients(batch), frozen) if not off]
    assert_sum(batch, masked, exact_sum(grads))
    assert len(batch.table.launches) > 5


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
def test_sums_of_squares_of_more_chunks_than_one_turn_of_the_last_block_adds(masked, seed):
    torch.manual_seed(seed)
    layouts = [(1 + i % 3, RowBlock.whole(1 + i % 3)) for i in range(2048 + 300)]
    batch = finite(batch_of(generator_of(seed, masked), [PLANS["bernoulli"]], (F32, F32), layouts))
    assert_sum(batch, masked, exact_sum(masked_gradients(batch) if masked else batch.grads))
    assert chunks_of(batch, masked) == len(layouts)


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
def test_the_order_in_which_blocks_arrive_does_not_show_in_the_sum(masked, seed):
    """One chunk a call, in any order; the last one writes the total, and none before it."""
    torch.manual_seed(seed)
    plans = [PLANS["bernoulli"], PLANS["fixed"]]
    layouts = [(size, RowBlock.whole(size)) for size in (70_001, 1, 64, 777, 0, 9, 1000)] + list(LAYOUTS)
    batch = finite(batch_of(generator_of(seed, masked), plans, (F32, F32), layouts))
    expected, call = cuda.sum_of_squares(batch, masked), cuda._call
    for _ in range(3):
        pending = []

        def keep_back(name, device, *arguments, pending=pending):
            if name != "sum_of_squares":
                return call(name, device, *arguments)
            launch, *rest, first, total = arguments
            whole = cuda.LaunchSpec.from_buffer_copy(ctypes.string_at(launch, ctypes.sizeof(cuda.LaunchSpec)))
            for chunk in range(whole.num_chunks):
                one = cuda.LaunchSpec.from_buffer_copy(whole)
                one.chunks, one.num_chunks = whole.chunks + 8 * chunk, 1
                pending.append((one, *rest, first + chunk, total))

        with mock.patch.object(cuda, "_call", keep_back):
            out = cuda.sum_of_squares(batch, masked).fill_(math.nan)
        assert len(pending) == chunks_of(batch, masked) > 20
        for i in torch.randperm(len(pending)).tolist():
            assert out.isnan(), "before the last block has arrived"
            one, *rest = pending[i]
            call("sum_of_squares", batch.device, ctypes.addressof(one), *rest)
        assert_same_bits(out, expected, "sum of squares")


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", DROPPING)
def test_what_a_mask_drops_is_not_in_the_sum_of_squares(name, offset, seed):
    """Infinities and NaN among dropped gradients; one among the kept ones makes the sum infinite or NaN."""
    torch.manual_seed(seed)
    plan = PLANS[name]
    layouts = [(size, RowBlock.whole(size)) for size in (3, 33, CHUNK + 5)] + list(LAYOUTS)
    clean = finite(batch_of(generator_of(seed, name), [plan], (F32, F32), layouts, offset))
    bad, last = copy_of(clean), None
    for row, grad in enumerate(bad.grads):
        facts = bad.keys[row], int(bad.steps[row]), bad.layouts[row], grad.numel(), bad.mask_words[row]
        keep, _ = keep_and_bucket(plan, *facts)
        keep = torch.zeros_like(grad, dtype=torch.bool) if keep is None else keep
        grad[~keep] = torch.tensor([math.inf, -math.inf, math.nan])[torch.randint(3, grad.shape)][~keep]
        if keep.any():
            last = grad, int(keep.nonzero()[-1])
    poisoned = any(not grad.isfinite().all() for grad in bad.grads)
    assert poisoned or name.startswith("one bucket")
    assert_same_bits(cuda.sum_of_squares(bad, True), cuda.sum_of_squares(clean, True), "after the mask")
    assert cuda.sum_of_squares(bad, False).isfinite() != poisoned
    for value in (math.inf, math.nan) if last else ():
        last[0][last[1]] = value
        assert not cuda.sum_of_squares(bad, True).isfinite()


def test_squares_that_float32_has_no_room_for_are_summed(seed):
    for value in (1e30, 1e-30, 1e-42):
        for offset in (0, 1):
            whole = [(1001, RowBlock.whole(1001))]
            batch = batch_of(generator_of(seed, value), [MaskPlan("keep")], (F32, F32), whole, offset)
            batch.grads[0].fill_(value)
            assert_sum(batch, True, exact_sum(batch.grads), f"{value}")


def test_no_elements_have_a_sum_of_squares_of_0(seed):
    for size, plan in ((0, MaskPlan("keep")), (9, MaskPlan("off", frozen=True))):
        batch = batch_of(generator_of(seed), [plan], (F32, F32), [(size, RowBlock.whole(size))])
        assert cuda.sum_of_squares(batch, True) == 0


@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
def test_a_norm_after_one_that_was_interrupted(masked, seed, monkeypatch):
    """Between two of its launches, as by Ctrl+C. The programs that had finished were counted."""
    torch.manual_seed(seed)
    layouts = [(size, RowBlock.whole(size)) for size in (5000, 70, 9000)]
    plans = [PLANS["bernoulli"], PLANS["buckets"], PLANS["bernoulli"]]
    batch = batch_of(generator_of(seed), plans, (F32, F32), layouts)
    batch.grads[1] = torch.randn(71)[1:]  # misaligned: a launch of its own
    finite(batch)
    expected, calls, call = cuda.sum_of_squares(copy_of(batch), masked), [], cuda._call

    def interrupted(name, *arguments):
        calls.append(name)
        if calls.count("sum_of_squares") == 2:
            raise KeyboardInterrupt
        call(name, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cuda, "_call", interrupted)
        cuda.sum_of_squares(batch, masked)
    batch.version += 1
    assert_same_bits(cuda.sum_of_squares(batch, masked), expected, "the next norm")


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16], ids=str)
def test_a_number_in_a_tensor_on_the_device(dtype, name, seed):
    """Read at every step anew, for tensors with ages and without; another dtype is taken by its value. A decay of 0
    leaves infinite weights alone, one that is 0 in float32 only does not.
    """
    require("cpu")
    layouts = [(size, RowBlock.whole(size)) for size in (500, 5000)]
    batch = batch_of(generator_of(seed), [PLANS["ages"], PLANS["bernoulli"]], (F32, F32), layouts)
    expected, number = copy_of(batch), torch.tensor(0.1, dtype=dtype)
    batch.hypers = [dataclasses.replace(hyper, **{name: number}) for hyper in batch.hypers]
    for value in (0.1, 0.03, 0.0, 1e-300):
        number.fill_(value)
        for each in (batch, expected):
            for param in each.params:
                param[:9] = torch.inf
        expected.hypers = [dataclasses.replace(hyper, **{name: number.item()}) for hyper in expected.hypers]
        cuda.masked_adamw_(batch)
        cpu.masked_adamw_(expected)
        assert_same_batches(batch, expected, f"{name} {value}")


@pytest.mark.skipif(cuda.unavailable() is not None, reason="the cuda backend cannot run here")
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("masked", [False, True], ids=["as they are", "masked"])
@pytest.mark.parametrize("name", PLANS)
def test_the_device_has_the_bits_of_the_emulated_sum_of_squares(name, masked, offset, seed):
    """However its blocks arrive."""
    torch.manual_seed(seed)
    layouts = [(size, RowBlock.whole(size)) for size in (*SIZES, 3_000_001)] + list(LAYOUTS)
    batch = finite(batch_of(generator_of(seed, name), [PLANS[name]], (F32, F32), layouts, offset))
    expected, there = cuda.sum_of_squares(batch, masked), copy_of(batch, "cuda")
    for _ in range(10):
        assert_same_bits(cuda.sum_of_squares(there, masked).cpu(), expected, f"sum of squares, {name}")


@pytest.mark.parametrize("after", [False, True], ids=["before the mask", "after it"])
def test_a_clipped_training_has_the_norms_of_the_reference(after, emulation, seed):
    """In float32, of sums in float64 whose order differs."""
    norms = {}
    for backend in (emulation, "exact"):
        torch.manual_seed(seed)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (1000, 5, 2 * CHUNK + 3)]
        arguments = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.5, "norm_after_mask": after}
        optimizer = FusedGradDropAdamW(params, mask=GradDrop(0.3), seed=seed, backend=backend, **arguments)
        norms[backend] = []
        for _ in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            norms[backend].append(optimizer.grad_norm)
    torch.testing.assert_close(norms[emulation], norms["exact"], rtol=2.0**-22, atol=0)


_NOT_READ = """
import batches
import torch
from graddrop_kernels.backends import cuda

kept, off = (batches.PLANS[name] for name in ("keep", "off"))
for name, offset in [(name, offset) for name in batches.PLANS for offset in (0, 1)]:
    sizes = [(size, batches.RowBlock.whole(size)) for size in (33, 5000)]
    plans = [batches.PLANS[name], off]
    batch = batches.batch_of(torch.Generator().manual_seed(1), plans, (torch.float32,) * 2, sizes, offset)
    batch.grads[0].fill_(1.0)
    total = cuda.sum_of_squares(batch, True)
    assert total > 0 or name in ("off", "a bucket of 300", "a bucket of 300 in planes")
    batch.table.rows[1, 1] = 16 + 4 * offset  # the address of the second row's gradient
    assert cuda.sum_of_squares(batch, True) == total
"""


def test_the_gradient_of_a_dropped_block_is_not_read():
    """In a process of its own, which would not survive: there is nothing at the address."""
    code = f"import sys; sys.path[:] = {sys.path}\n{_NOT_READ}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stderr)


# --- masks ------------------------------------------------------------------------------------------------------------

MASK_LAYOUTS = [(size, RowBlock.whole(size)) for size in SIZES] + list(LAYOUTS)


@pytest.mark.parametrize("name", PLANS)
def test_masks_of_whole_tensors(name, seed):
    plan, generator, device = PLANS[name], generator_of(seed), torch.device("cpu")
    for numel, layout in MASK_LAYOUTS:
        key = int(torch.randint(2**62, (), generator=generator))
        words = words_of(plan, key, layout, numel, generator)
        keep = keep_and_bucket(plan, key, 11, layout, numel, words)[0]
        if keep is None:
            keep = torch.full((numel,), plan.kind != "off")
        mask = cuda.keep_mask(plan, key, 11, layout, numel, words, device)
        assert_same_bits(mask, keep, f"mask of {numel} elements of {layout}")


@pytest.mark.parametrize("buckets", [1, 2, 5, 300, 4096])
def test_bucket_planes(buckets, seed):
    for i, (numel, layout) in enumerate(MASK_LAYOUTS):
        planes = cuda.bucket_planes(seed + i, buckets, layout, numel, torch.device("cpu"))
        assert_same_bits(planes, cpu.bucket_planes(seed + i, buckets, layout, numel), f"{buckets} in {layout}")


# --- the library and the call -----------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    library, _ = cuda._load()
    assert library is not None
    if not torch.cuda.is_available():
        wanted = "without CUDA; install" if torch.version.cuda is None else "nvidia-smi"
        assert wanted in cuda.unavailable()
    for content, reason in ((None, "GRADDROP_FORCE_CUDA=1"), (b"no library", "run pip install again")):
        path = tmp_path / "_cuda.so"
        if content:
            path.write_bytes(content)
        with mock.patch.object(cuda, "_LIBRARY", path):
            cuda._load.cache_clear()
            assert reason in cuda.unavailable()
            with pytest.raises(RuntimeError, match="cuda backend cannot run"):
                cuda.bucket_planes(1, 2, RowBlock.whole(3), 3, torch.device("cpu"))
    cuda._load.cache_clear()
    with mock.patch.object(cuda, "TABLE_VERSION", -1):
        assert "built from other sources" in cuda.unavailable()
    cuda._load.cache_clear()


def test_a_failed_launch_is_raised_with_its_reason():
    """Without a device every launch fails; with one, a launch of too many blocks."""
    library, _ = cuda._load()
    spec = cuda.LaunchSpec(num_chunks=2**32 - 1)
    error = library.graddrop_cuda_masked_adamw(ctypes.addressof(spec), None)
    reason = library.graddrop_cuda_error(error).decode()
    assert error != 0 and reason not in ("", "no error")
    with (
        mock.patch.object(library, "graddrop_cuda_emulate_masked_adamw", lambda *_: error),
        pytest.raises(RuntimeError, match=f"masked_adamw cannot be launched on cpu: {re.escape(reason)}"),
    ):
        cuda._call("masked_adamw", torch.device("cpu"), ctypes.addressof(spec))


def test_the_order_of_lanes_does_not_matter(seed):
    """Blocks and threads of a step share nothing: a batch of one tensor at a time gives the same bits."""
    layouts = [(size, RowBlock.whole(size)) for size in SIZES]
    together = batch_of(generator_of(seed), [PLANS["ages"]], (F32, F32), layouts)
    apart = copy_of(together)
    cuda.masked_adamw_(together)
    for i, _ in enumerate(layouts):
        one = dataclasses.replace(apart, table=None, **{
            name: getattr(apart, name)[i : i + 1] for name in (*LISTS, "keys", "layouts", "mask_words", "hyper_rows")
        })  # fmt: skip
        cuda.masked_adamw_(one)
    assert_same_batches(together, apart, "one tensor at a time")
