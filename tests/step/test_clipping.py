"""max_grad_norm: torch's clip_grad_norm_ and then the step, in one; the norm before or after the mask."""

import copy
import math

import pytest
import torch
from cases import BF16, F32, F64, Engine
from toy import bits

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, GradDrop, GradDropEpoch, LayerGradDrop
from graddrop_kernels.backends import cpu, device_tables
from graddrop_kernels.groups.options import check_max_grad_norm

ARGUMENTS = {"lr": 0.03, "betas": (0.75, 0.96875), "eps": 1e-4, "weight_decay": 0.2}
POLICIES = {
    "plain": (None, {}),
    "graddrop": (GradDrop(0.3), {}),
    "gaussian": (GaussianGradDrop(0.3), {}),
    "layer": (LayerGradDrop(0.5, layers=["layer.*"]), {}),
    "frozen layer": (LayerGradDrop(0.5, layers=["layer.*"]), {"masked": "frozen"}),
    "epoch": (GradDropEpoch(3), {}),
}
SIZES = (1031, 64, 0, 7)


def make(policy, dtype, backend, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    mask, masked = POLICIES[policy]
    optimizer = FusedGradDropAdamW(
        [(f"layer.{i}.weight", param) for i, param in enumerate(params)],
        **{**ARGUMENTS, **masked, **more}, mask=mask, seed=seed, backend=backend,
    )  # fmt: skip
    optimizer.set_epoch(1)
    return params, optimizer


def give_grads(params, step, seed, size=1.0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for param in params:
        param.grad = (size * torch.randn(param.shape, generator=generator)).to(param.dtype)


def exact_norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("max_norm", [0.7, 1e6, math.inf])
def test_a_clipped_step_is_clip_grad_norm_and_a_step(max_norm, policy, dtype, backend, seed):
    """Given the same norm, bit for bit in float32 and float64; bfloat16 gradients stay unrounded here."""
    clipped, other = make(policy, dtype, backend, seed, max_grad_norm=max_norm), make(policy, dtype, backend, seed)
    if not Engine(backend).takes((dtype, dtype)):
        give_grads(clipped[0], 0, seed)
        with pytest.raises(RuntimeError, match=f"backend='{backend}' does not take float64 parameters"):
            clipped[1].step()
        return
    for step in range(4):
        for params, _ in (clipped, other):
            give_grads(params, step, seed)
        before, norm = [bits(param.grad) for param in clipped[0]], exact_norm(param.grad for param in clipped[0])
        clipped[1].step()
        assert [bits(param.grad) for param in clipped[0]] == before, "gradients are not written"
        ours = clipped[1].grad_norm
        assert ours.shape == () and ours.dtype == (F64 if dtype == F64 else F32)
        assert abs(ours.item() - norm) <= 2 * torch.finfo(ours.dtype).eps * norm
        factor = (max_norm / (ours + 1e-6)).clamp(max=1.0)
        for param in other[0]:
            param.grad.mul_(factor)
        other[1].step()
        for ours, theirs in zip(clipped[0], other[0]):
            if dtype == BF16:
                assert torch.allclose(ours.float(), theirs.float(), rtol=2**-6, atol=2**-8)
            else:
                assert bits(ours) == bits(theirs), step


def test_as_torch_has_it(backend, seed):
    """torch's own float32 norm is off by a few millionths; the first steps differ by no more than that makes."""
    clipped, other = make("graddrop", F32, backend, seed, max_grad_norm=0.7), make("graddrop", F32, backend, seed)
    for step in range(3):
        for params, _ in (clipped, other):
            give_grads(params, step, seed)
        theirs = torch.nn.utils.clip_grad_norm_(other[0], 0.7)
        clipped[1].step()
        other[1].step()
        assert torch.allclose(clipped[1].grad_norm, theirs, rtol=1e-5)
    for a, b in zip(clipped[0], other[0]):
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * ARGUMENTS["lr"])


@pytest.mark.parametrize("policy", POLICIES)
def test_norm_after_the_mask(policy, backend, seed):
    """Of what the moments see: recovered from the first moment of a first step without clipping."""
    params, optimizer = make(policy, F32, backend, seed, max_grad_norm=1e9, norm_after_mask=True)
    give_grads(params, 0, seed)
    optimizer.step()
    seen = [optimizer.state[param]["exp_avg"].double() / (1 - 0.75) for param in params]
    assert math.isclose(optimizer.grad_norm.item(), exact_norm(seen), rel_tol=1e-5)
    if policy not in ("plain", "layer", "frozen layer"):
        assert not math.isclose(optimizer.grad_norm.item(), exact_norm(param.grad for param in params), rel_tol=1e-3)


def test_a_dropped_infinity_does_not_count_after_the_mask(backend, seed):
    for after in (True, False):
        params, optimizer = make("graddrop", F32, backend, seed, max_grad_norm=1.0, norm_after_mask=after)
        give_grads(params, 0, seed)
        with torch.no_grad():
            params[0].grad[~optimizer.mask(params[0])] = math.inf
        optimizer.step()
        assert optimizer.grad_norm.isfinite() == after


def test_groups_of_several_dtypes_have_one_norm(backend, seed):
    dtypes = [dtype for dtype in (F32, BF16, F64) if Engine(backend).takes((dtype, dtype))]
    named = [(f"{dtype}", torch.nn.Parameter(torch.ones(50, dtype=dtype))) for dtype in dtypes]
    optimizer = FusedGradDropAdamW(
        [{"params": [pair]} for pair in named], **ARGUMENTS, mask=None, backend=backend, max_grad_norm=0.5
    )
    params = [param for _, param in named]
    give_grads(params, 0, seed)
    optimizer.step()
    assert math.isclose(optimizer.grad_norm.item(), exact_norm(param.grad for param in params), rel_tol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_scaled_gradients_have_the_norm_of_the_unscaled(scale, backend, seed):
    params, optimizer = make("graddrop", F32, backend, seed, max_grad_norm=0.5, fused=True)
    plain, reference = make("graddrop", F32, backend, seed, max_grad_norm=0.5)
    give_grads(params, 0, seed, scale)
    give_grads(plain, 0, seed)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    reference.step()
    assert bits(optimizer.grad_norm) == bits(reference.grad_norm)
    assert list(map(bits, params)) == list(map(bits, plain))


def test_it_may_change_and_end(backend, seed):
    params, optimizer = make("plain", F32, backend, seed, max_grad_norm=0.5)
    plain, reference = make("plain", F32, backend, seed)
    for step, norm in enumerate((0.5, None, 0.25)):
        optimizer.max_grad_norm = norm
        for each in (params, plain):
            give_grads(each, step, seed)
        optimizer.step()
        if norm is not None:
            for param in plain:
                param.grad.mul_((norm / (optimizer.grad_norm + 1e-6)).clamp(max=1.0))
        reference.step()
        assert list(map(bits, params)) == list(map(bits, plain)), step


def test_tables_are_made_once_a_step(backend, seed, monkeypatch):
    """The update takes those of the norm; the next step, with other gradients and another lr, makes its own."""
    params, optimizer = make("graddrop", F32, backend, seed, max_grad_norm=0.5)
    made = []
    for module in (cpu, device_tables):
        table = module.hyper_table
        monkeypatch.setattr(module, "hyper_table", lambda *args, table=table: made.append(args) or table(*args))
    for step in range(3):
        give_grads(params, step, seed)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        assert len(made) == (step + 1 if backend in ("cpu", "triton") else 0)


def test_copies_keep_it_and_steps_without_gradients_pass(seed):
    params, optimizer = make("graddrop", F32, "auto", seed, max_grad_norm=0.5, norm_after_mask=True)
    optimizer.step()
    assert optimizer.grad_norm is None
    twin = copy.deepcopy(optimizer)
    assert (twin.max_grad_norm, twin.norm_after_mask) == (0.5, True)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1", True])
def test_what_cannot_be_a_norm(value, seed):
    with pytest.raises(ValueError, match="max_grad_norm must be a number > 0, or None for no clipping"):
        make("graddrop", F32, "auto", seed, max_grad_norm=value)
    params, optimizer = make("graddrop", F32, "auto", seed)
    give_grads(params, 0, seed)
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm is None
    for group in optimizer.param_groups:
        group["max_grad_norm"] = value
    before = list(map(bits, params))
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()
    assert list(map(bits, params)) == before and not optimizer.state
    assert check_max_grad_norm(None) is None and check_max_grad_norm(1) == 1
