"""The CUDA kernels' text, run by the host thread after thread: the bits of the cpu backend and of "exact".

What it leaves unproved is the hardware: the shuffle between two lanes, the accesses of 16 bytes, and that the device's
pow() rounds to the same float32 as the host's.
"""

import ctypes
import dataclasses
import re
from unittest import mock

import cases
import pytest
import torch
from batches import CHUNK, LAYOUTS, LISTS, PLANS, SIZES, assert_same_batches, batch_of, copy_of, generator_of, words_of
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
from test_backends_agree import assert_bits, run_in_step

from graddrop_kernels import backends, bitmask
from graddrop_kernels.backends import cpu, cuda
from graddrop_kernels.layout import RowBlock
from graddrop_kernels.multi_tensor import TensorBatch
from graddrop_kernels.plan import MaskPlan
from graddrop_kernels.reference import keep_and_bucket, masked_adamw_

pytestmark = [
    pytest.mark.skipif(not cuda._LIBRARY.exists(), reason="_cuda.so was not built: no nvcc, or GRADDROP_NO_CUDA"),
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


@pytest.mark.parametrize("mode", [False, True], ids=["plain", "mode"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_policies_have_the_exact_bits(masking, mode, seed, monkeypatch):
    """Whole trainings over several epochs, through the optimizer."""
    row = backends.Backend(
        "cuda-emulation", "", ("cpu",), backends._FUSED_DTYPES, False, lambda: None, cuda.masked_adamw_, True, True
    )
    monkeypatch.setitem(backends._BY_NAME, row.name, row)
    monkeypatch.setitem(cases._ROWS, row.name, row)
    place = list(MASKINGS).index(masking)
    modes = MODES if mode else [(dtypes, False, False) for dtypes in DTYPES]
    dtypes, masters, stochastic = modes[place % len(modes)]
    hyper = list(HYPERS)[place // len(modes) % len(HYPERS)]
    case = Case(masking, hyper, dtypes, (0, 1, 3, 33, 1031, CHUNK + 1), masters, stochastic)
    run_in_step(case, seed, [Engine(row.name)], 6, assert_bits, start=3)


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
        arguments = (plan, key, 11, layout, numel, device, words)
        assert_same_bits(cuda.mask(*arguments), keep, f"mask of {numel} elements of {layout}")
        assert_same_bits(cuda.packed_mask(*arguments), bitmask.pack(keep), f"packed mask of {numel} of {layout}")
        assert cuda.count_kept(*arguments) == keep.sum()


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
