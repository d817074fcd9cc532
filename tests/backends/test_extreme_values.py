"""Finite values at the ends of what a dtype holds: no NaN where torch's fused step has none."""

import math

import pytest
import torch
from cases import BF16, F16, F32, F64

from graddrop_kernels import FusedGradDropAdamW, GradDrop

HYPERS = (
    {"lr": 1e-3, "weight_decay": 0.0}, {"lr": 10.0, "betas": (0.5, 0.9999), "eps": 0.0, "weight_decay": 0.1},
    {"lr": 1e-30, "betas": (0.0, 0.0), "eps": 1e-3, "weight_decay": 1e3},
    {"lr": 1e5, "betas": (0.9, 0.0), "amsgrad": True},
)  # fmt: skip


def extreme(dtype, count, generator):
    """Numbers of either sign, even in their exponents from the subnormal ones to the largest."""
    facts = torch.finfo(dtype)
    low, high = math.log10(facts.smallest_normal) - 2, math.log10(facts.max)
    exponents = low + (high - low) * torch.rand(count, generator=generator, dtype=F64)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    return (10**exponents * signs).clamp(-facts.max, facts.max).to(dtype)


@pytest.mark.parametrize("hyper", HYPERS, ids=lambda hyper: f"lr={hyper['lr']}")
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_a_step_from_finite_values_makes_no_nan_of_its_own(dtype, hyper, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    values, grad = (extreme(dtype, 4099, generator) for _ in range(2))
    theirs, ours = (torch.nn.Parameter(values.clone()) for _ in range(2))
    torchs = torch.optim.AdamW([theirs], **hyper, fused=True)
    optimizer = FusedGradDropAdamW([ours], **hyper, mask=None, backend="auto" if dtype == F64 else backend)
    theirs.grad, ours.grad = grad.clone(), grad.clone()
    torchs.step()
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[ours][name].isnan().any(), name
    made = ours.isnan() & ~theirs.isnan()
    assert not made.any(), f"of {values[made][:3]} by {grad[made][:3]}, where torch has {theirs[made][:3]}"
    overflows = grad.double().abs() > torch.finfo(F32 if dtype != F64 else F64).max ** 0.5
    assert overflows.any() == (dtype != F16)


def test_one_infinite_square_leaves_its_neighbours(backend):
    params = [torch.nn.Parameter(torch.full((40,), 2.0)) for _ in range(2)]
    optimizer = FusedGradDropAdamW(params, mask=GradDrop(0.0), lr=0.1, weight_decay=0.0, backend=backend)
    for param, largest in zip(params, (1e30, 1.0)):
        param.grad = torch.ones(40)
        param.grad[7] = largest
    optimizer.step()
    stayed = params[0].detach() == 2.0
    assert stayed.nonzero().flatten().tolist() == [7]
    stayed = torch.where(stayed, params[1].detach(), params[0].detach())
    assert torch.equal(stayed, params[1].detach())
