"""mask_gradients_: every backend masks gradients in place with the same bits, and touches nothing else."""

import dataclasses

import pytest
import torch
from batches import CHUNK, LAYOUTS, LISTS, OF_GRADIENTS, SIZES, batch_of, copy_of, generator_of
from cases import BF16, ENGINES, F16, F32, F64, Engine, assert_same_bits, require

from graddrop_kernels import backends
from graddrop_kernels.backends import cpu, cuda
from graddrop_kernels.backends.batch import TensorBatch
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.masks.rule import keep_and_bucket

DTYPES = (F32, BF16, F16)


def masked_by(engine: Engine, batch: TensorBatch) -> TensorBatch:
    batch = copy_of(batch, engine.device)
    with cpu.using_isa(engine.isa):
        backends._BY_NAME[engine.backend].mask_gradients_(batch)
    return copy_of(batch)


def assert_only_gradients_differ(actual: TensorBatch, expected: TensorBatch, before: TensorBatch, what: object) -> None:
    for name in LISTS:
        for i, (a, b) in enumerate(zip(getattr(actual, name), getattr(expected if name == "grads" else before, name))):
            if a is not None:
                assert_same_bits(a, b, f"{what}: {name}[{i}] of {a.numel()} elements", any_nan=True)


def masked_plainly(batch: TensorBatch, row: int) -> torch.Tensor:
    """The masked gradient, from the mask rule and torch's own multiplication."""
    plan, grad, steps = batch.hypers[batch.hyper_rows[row]].plan, batch.grads[row], int(batch.steps[row])
    if plan.kind in ("keep", "off"):
        return grad if plan.kind == "keep" else torch.zeros_like(grad)
    keep, _ = keep_and_bucket(plan, batch.keys[row], steps, batch.layouts[row], grad.numel(), batch.mask_words[row])
    scale = torch.tensor(plan.scale, dtype=F32) if plan.kind in ("bernoulli", "fixed") else torch.tensor(1.0)
    return torch.where(keep, (grad.float() * scale).to(grad.dtype), torch.zeros((), dtype=grad.dtype))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_all_backends_have_the_same_bits(name, dtype, offset, seed):
    require("cpu")
    layouts = [(size, RowBlock.whole(size)) for size in SIZES] + list(LAYOUTS)
    batch = batch_of(generator_of(seed, name, dtype), [OF_GRADIENTS[name]], (dtype, dtype), layouts, offset)
    expected = masked_by(Engine("exact"), batch)
    for row, grad in enumerate(expected.grads):
        if OF_GRADIENTS[name].kind != "gaussian":
            assert_same_bits(grad, masked_plainly(batch, row), f"{name}: row {row}", any_nan=True)
    for engine in ENGINES:  # on a machine with a GPU also what runs there
        if engine.backend != "reference" or OF_GRADIENTS[name].kind != "gaussian":  # whose fma is a product and a sum
            assert_only_gradients_differ(masked_by(engine, batch), expected, batch, engine)
    emulated = copy_of(batch)
    cuda.mask_gradients_(emulated)
    assert_only_gradients_differ(emulated, expected, batch, "cuda emulation")
    assert {launch.aligned for launch in emulated.table.launches} == ({False} if offset else {True, False})


@pytest.mark.parametrize("drawn", ["bernoulli", "gaussian", "buckets", "ages in planes", "fixed frozen"])
def test_rows_of_all_kinds_in_one_batch(drawn, seed):
    plans = [OF_GRADIENTS[drawn], MaskPlan("keep"), MaskPlan("off"), MaskPlan("off", frozen=True)]
    layouts = [(size, RowBlock.whole(size)) for size in (33, 5000, CHUNK, 0, 70, 8200)] * 2
    batch = batch_of(generator_of(seed, drawn), plans, (F32, F32), layouts)
    expected = masked_by(Engine("exact"), batch)
    for row, grad in enumerate(expected.grads):
        kept = batch.hypers[batch.hyper_rows[row]].plan.kind
        if kept == "off":
            assert not grad.any() and not grad.signbit().any()
        if kept == "keep":
            assert_same_bits(grad, batch.grads[row], "keep", any_nan=True)
    for engine in ENGINES:  # on a machine with a GPU also what runs there
        if engine.backend != "reference" or drawn != "gaussian":
            assert_only_gradients_differ(masked_by(engine, batch), expected, batch, engine)
    emulated = copy_of(batch)
    cuda.mask_gradients_(emulated)
    assert_only_gradients_differ(emulated, expected, batch, "cuda emulation")


def test_a_gradient_that_is_kept_whole_is_not_read(seed):
    """Its address may be anything: rows of the kind keep are no work."""
    batch = batch_of(generator_of(seed), [MaskPlan("keep")], (F32, F32), [(4096, RowBlock.whole(4096))])
    called = []
    for module, name in ((cpu, "cpu"), (cuda, "cuda")):
        table = copy_of(batch)
        table.grad_addresses = lambda: [8]  # a read would end the process
        module.mask_gradients_(table)
        called.append(name)
    assert called == ["cpu", "cuda"]


def test_masks_of_a_step_are_those_of_its_norm_and_update(seed):
    """The sum of the squares of masked gradients, before and after mask_gradients_ has masked them."""
    layouts = [(size, RowBlock.whole(size)) for size in (33, 5000)]
    for name, plan in OF_GRADIENTS.items():
        batch = batch_of(generator_of(seed, name), [plan], (F32, F32), layouts)
        for grad in batch.grads:
            grad.nan_to_num_(0.0, 1.0, -1.0)
        masked, plain = masked_by(Engine("cpu"), batch), dataclasses.replace(copy_of(batch))
        assert_same_bits(cpu.sum_of_squares(masked, False), cpu.sum_of_squares(plain, True), name)


@pytest.mark.parametrize("dtype", [F64, torch.complex64, torch.complex128], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "fixed", "off", "buckets in planes"])
def test_wide_and_complex_gradients(name, dtype, seed):
    """A mask keeps or drops both numbers of a pair."""
    generator, numel, key = generator_of(seed, name, dtype), 1031, 12345 + seed
    grad = torch.randn(numel, generator=generator, dtype=dtype)
    row = batch_of(generator, [OF_GRADIENTS[name]], (F32, F32), [(numel, RowBlock.whole(numel))])
    if row.mask_words[0] is not None and OF_GRADIENTS[name].kind == "bucket":
        row.mask_words = [backends.bucket_planes(key, OF_GRADIENTS[name].buckets, row.layouts[0], numel, grad.device)]
    pairs = torch.view_as_real(grad) if dtype.is_complex else grad
    batch = dataclasses.replace(
        row, param_dtype=dtype, moment_dtype=dtype, grad_dtype=dtype, keys=[key], grads=[pairs.clone()], params=[],
    )  # fmt: skip
    for backend in ("reference", "exact"):
        masked = dataclasses.replace(batch, grads=[pairs.clone()])
        backends._BY_NAME[backend].mask_gradients_(masked)
        actual = torch.view_as_complex(masked.grads[0]) if dtype.is_complex else masked.grads[0]
        if OF_GRADIENTS[name].kind == "gaussian":
            factor = (actual / grad).real
            assert torch.allclose(actual, grad * factor.to(dtype)) and 0.4 < float(factor.std()) < 0.6
        elif OF_GRADIENTS[name].kind == "off":
            assert not actual.any()
        else:
            keep, _ = keep_and_bucket(OF_GRADIENTS[name], key, 3, batch.layouts[0], numel, batch.mask_words[0])
            scale = OF_GRADIENTS[name].scale if OF_GRADIENTS[name].kind != "bucket" else 1.0
            expected = torch.where(keep, grad * torch.tensor(scale, dtype=pairs.dtype), torch.zeros((), dtype=dtype))
            assert torch.equal(actual, expected)
