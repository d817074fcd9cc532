"""Complex parameters: stepped as pairs of real numbers, as torch does, and masked as one element each."""

import pytest
import torch
from cases import require
from toy import bits

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GaussianGradDrop, GradDrop, GradDropEpoch

ARGUMENTS = {"lr": 0.03, "betas": (0.75, 0.96875), "eps": 1e-4, "weight_decay": 0.2}
C64, C128 = torch.complex64, torch.complex128
SHAPE = (17, 9)
KEPT = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5
POLICIES = {
    "plain": (lambda: None, {}),
    "graddrop": (lambda: GradDrop(0.3), {}),
    "frozen": (lambda: GradDrop(0.4), {"masked": "frozen"}),
    "epoch": (lambda: GradDropEpoch(4), {}),
    "bit-packed": (lambda: GradDropEpoch(4, storage="bitpacked"), {}),
    "fixed": (lambda: FixedMask({"weight": KEPT}), {}),
    "gaussian": (lambda: GaussianGradDrop(0.3), {}),
}
both = pytest.mark.parametrize("backend", ["auto", "reference", "exact"])
dtypes = pytest.mark.parametrize("dtype", [C64, C128], ids=str)


def random(dtype, seed):
    return torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make(policy, dtype, backend, seed, **more):
    param = torch.nn.Parameter(random(dtype, seed))
    mask, masked = POLICIES[policy]
    optimizer = FusedGradDropAdamW(
        [("weight", param)], **{**ARGUMENTS, **masked, **more}, mask=mask(), seed=seed, backend=backend
    )
    optimizer.set_epoch(1)
    return param, optimizer


@both
@dtypes
@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_without_a_mask_it_is_torchs(more, dtype, backend, seed):
    param, ours = make("plain", dtype, backend, seed, **more)
    other = torch.nn.Parameter(param.detach().clone())
    theirs = torch.optim.AdamW([other], **ARGUMENTS, **more)
    for step in range(5):
        param.grad, other.grad = random(dtype, 7 * seed + step), random(dtype, 7 * seed + step)
        ours.step()
        theirs.step()
    state = {"param": (param.detach(), other.detach())}
    state |= {key: (value, theirs.state[other][key]) for key, value in ours.state[param].items() if key != "step"}
    assert set(state) == {"param", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if more.get("amsgrad") else ())}
    for key, (mine, expected) in state.items():
        assert mine.dtype == dtype, key
        # Sums of terms of either sign, of about 1, may all but cancel; those of squares do not.
        eps, terms = torch.finfo(dtype).eps, 0 if key.endswith("exp_avg_sq") else 1
        assert torch.allclose(mine, expected, rtol=40 * eps, atol=4 * terms * eps), key


@both
@dtypes
@pytest.mark.parametrize("policy", POLICIES)
def test_both_parts_are_masked_alike(policy, dtype, backend, seed):
    """As two real parameters under the complex one's mask: its gradient's parts, masked by hand."""
    param, optimizer = make(policy, dtype, backend, seed)
    for step in range(3):
        keep, before = optimizer.mask("weight"), param.detach().clone()
        assert keep.shape == SHAPE
        moment = optimizer.state[param]["exp_avg"].clone() if step else torch.zeros(SHAPE, dtype=dtype)
        param.grad = random(dtype, 7 * seed + step)
        optimizer.step()
        change = torch.view_as_real(optimizer.state[param]["exp_avg"] - 0.75 * moment) / 0.25
        parts = torch.view_as_real(param.grad)
        rtol = 500 * torch.finfo(dtype).eps
        dropped = ~keep.unsqueeze(-1).expand_as(parts)
        if policy == "gaussian":
            factor = change / parts
            assert torch.allclose(factor[..., 0], factor[..., 1], rtol=1e3 * rtol) and factor.std() > 0.3
            continue
        assert 0.2 < keep.double().mean() < 1 or policy == "plain"
        scale = 65536 / (65536 - round(0.3 * 65536)) if policy == "graddrop" else 1
        scale = 65536 / (65536 - round(0.4 * 65536)) if policy == "frozen" else scale
        assert torch.allclose(change[~dropped], scale * parts[~dropped], rtol=0, atol=100 * rtol)
        if policy == "graddrop":
            assert (change[dropped].abs() < 100 * rtol).all()
        else:
            assert bits(param[~keep]) == bits(before[~keep])


def test_the_masks_are_those_of_a_real_parameter(seed):
    """Of the same name and shape: an element is an element."""
    for policy in POLICIES:
        _, optimizer = make(policy, C64, "auto", seed)
        mask, masked = POLICIES[policy]
        real = FusedGradDropAdamW(
            [("weight", torch.nn.Parameter(torch.ones(SHAPE)))], **{**ARGUMENTS, **masked}, mask=mask(), seed=seed
        )
        real.set_epoch(1)
        for step in range(3):
            assert torch.equal(optimizer.mask("weight", step=step), real.mask("weight", step=step))


MEMORY = {
    "transposed": lambda value: value.t().contiguous().t(),
    "conjugated": lambda value: value.conj().resolve_conj().conj(),
    "every second": lambda value: torch.stack((value, value), -1)[..., 0],
}


@dtypes
@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_and_parameters_in_other_memory(memory, dtype, seed):
    param, optimizer = make("graddrop", dtype, "auto", seed)
    other = torch.nn.Parameter(MEMORY[memory](param.detach()).detach())
    twin = FusedGradDropAdamW([("weight", other)], **ARGUMENTS, mask=GradDrop(0.3), seed=seed)
    for step in range(2):
        param.grad = random(dtype, seed + step)
        other.grad = MEMORY[memory](param.grad)
        optimizer.step()
        twin.step()
    assert bits(param.resolve_conj()) == bits(other.detach().resolve_conj().contiguous())


def test_clipping_counts_the_size_of_complex_numbers(seed):
    param, optimizer = make("graddrop", C64, "auto", seed, max_grad_norm=0.5)
    param.grad = random(C64, seed)
    optimizer.step()
    assert abs(optimizer.grad_norm - param.grad.abs().double().square().sum().sqrt()) < 1e-5 * optimizer.grad_norm


def test_resume(seed, tmp_path):
    whole, first = make("graddrop", C64, "auto", seed), make("graddrop", C64, "auto", seed)
    for param, optimizer in (whole, first):
        param.grad = random(C64, seed)
        optimizer.step()
    torch.save(first[1].state_dict(), tmp_path / "file")
    param, optimizer = make("graddrop", C64, "auto", seed)
    with torch.no_grad():
        param.copy_(first[0])
    optimizer.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for each, stepped in (whole, (param, optimizer)):
        each.grad = random(C64, seed + 1)
        stepped.step()
    assert bits(param) == bits(whole[0])


def test_a_fused_backend_by_name_is_refused(seed):
    require("cpu")
    param, optimizer = make("graddrop", C64, "cpu", seed)
    param.grad = random(C64, seed)
    with pytest.raises(RuntimeError, match="backend='cpu' does not take complex64 parameters"):
        optimizer.step()
