"""PyTorch's own inputs for AdamW (torch.testing._internal.common_optimizers) through every backend, without a mask:
torch's results within bounds, torch's error types and texts; what is refused today stands in REFUSED_TODAY.

The bounds are those of test_adamw_matches_torch.py, whose first lines say where the differences come from: for betas
that float32 cannot hold exp_avg_sq is off by 1.3e-5 of itself and the bias correction takes that out of the parameter.
"""

import contextlib
import re

import pytest
import torch
from cases import BF16, F16, F32, F64, Engine
from torch_inputs import INFO, OptimizerErrorEnum, all_inputs
from toy import refused

from graddrop_kernels import FusedGradDropAdamW
from graddrop_kernels.tools.verify.bounds import BOUNDS, ulp_at

# What torch's AdamW takes and ours does not: the argument, and what the refusal says.
REFUSED_TODAY = {
    "capturable": "capturable=True needs parameters on a GPU; leave it False",
}
STEPS, SHAPES = 20, ((1031,), (7, 11), (), (0, 3), (5,))
ULP = {F32: 2.0**-23, F64: 2.0**-52}
# exp_avg_sq relative to torch's: 1.3e-5 from the rounded beta2 = 0.999; the reference rounds beta2 g^2 too, which is
# another 2^-24 of 1000 times the sum. In float64 that is all.
SQUARES_OFF = {"reference": 1e-4}


def inputs(dtype=None):
    """torch's keyword arguments, those for GPUs too: they need none. Each with foreach, differentiable, fused or none
    of them, and made anew, as some hold tensors.
    """
    plain = [entry.kwargs for entry in INFO.optim_inputs_func("cuda", dtype)]
    if dtype is not None:
        return plain
    return [entry.kwargs for entry in all_inputs("cuda", dtype, INFO)]


def label(kwargs):
    return ",".join(f"{key}={value}" for key, value in kwargs.items() if value is not False) or "default"


def accepted(kwargs):
    """Without the flags that are refused today, without differentiable, which steps no leaf in either
    (test_differentiable.py), and without foreach where torch itself refuses a tensor lr.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in (*REFUSED_TODAY, "differentiable")}
    if isinstance(kwargs.get("lr"), torch.Tensor):
        kwargs.pop("foreach", None)
    return kwargs


def theirs_and_ours(kwargs, dtype, backend, seed):
    """(torch's AdamW, ours) over equal parameters, all at least 1/2 away from 0."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    values = [(value + value.sign() / 2).to(dtype) for value in values]
    sets = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    number = lambda value: float(value) if isinstance(value, torch.Tensor) else value
    # torch's for-loop computes 1 - lr * weight_decay in the dtype of a tensor lr: float32, even for float64 parameters.
    exactly = {"lr": number(kwargs.get("lr", 1e-3)), "betas": tuple(map(number, kwargs.get("betas", (0.9, 0.999))))}
    theirs = torch.optim.AdamW(sets[0], **{**kwargs, **(exactly if dtype == F64 else {})})
    return theirs, FusedGradDropAdamW(sets[1], **kwargs, mask=None, backend=backend)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(theirs, ours, generator):
    for a, b in zip(params_of(theirs), params_of(ours), strict=True):
        a.grad = torch.randn(a.shape, generator=generator).mul_(3).to(a.dtype)
        b.grad = a.grad.clone()


def first_moments(ours):
    return [ours.state[p]["exp_avg"].clone() if p in ours.state else torch.zeros_like(p) for p in params_of(ours)]


def sizes(ours, param, before, kwargs, step):
    """(the first moment's operands, the update's operands), float64."""
    state, grad = {key: value.double() for key, value in ours.state[param].items()}, param.grad.double().abs()
    beta1, beta2 = (float(beta) for beta in kwargs.get("betas", (0.9, 0.999)))
    moment = beta1 * before.double().abs() + (1 - beta1) * grad
    denom = (state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - beta2**step)).sqrt() + kwargs.get("eps", 1e-8)
    return moment, moment * float(kwargs.get("lr", 1e-3)) / (1 - beta1**step) / denom


# Inputs.


@pytest.mark.parametrize("index", range(len(inputs())), ids=[label(kwargs) for kwargs in inputs()])
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_torchs_inputs_give_torchs_results(index, dtype, backend, seed):
    """STEPS steps of each on its own: an ulp a step of the largest parameter and of the way that it has gone."""
    kwargs = inputs()[index]
    if dtype == F32 and any(kwargs.get(flag) for flag in REFUSED_TODAY):
        said = "|".join(text for flag, text in REFUSED_TODAY.items() if kwargs.get(flag))
        with refused(ValueError, said):
            FusedGradDropAdamW([torch.nn.Parameter(torch.ones(3))], **{**kwargs, "differentiable": False}, mask=None)
    kwargs = accepted(kwargs)
    theirs, ours = theirs_and_ours(kwargs, dtype, backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    set_grads(theirs, ours, generator)
    if not Engine(backend).takes((dtype, dtype)):
        with refused(RuntimeError, f"backend='{backend}' does not take float64 parameters", optimizer=ours):
            ours.step()
        return
    start = [param.detach().to(F64, copy=True) for param in params_of(ours)]
    largest, largest_grad, travel = (
        [param.abs() for param in start],
        [0 * param for param in start],
        [0 * param for param in start],
    )
    for step in range(1, STEPS + 1):
        set_grads(theirs, ours, generator)
        before = first_moments(ours)
        theirs.step()
        ours.step()
        for i, param in enumerate(params_of(ours)):
            travel[i] += sizes(ours, param, before[i], kwargs, step)[1]
            largest[i] = largest[i].maximum(param.detach().double().abs())
            largest_grad[i] = largest_grad[i].maximum(param.grad.double().abs())
    # The reference rounds the product in every fma, as "exact" does in float64.
    per_step = 3 if backend in BOUNDS or dtype == F64 else 1
    for i, (a, b) in enumerate(zip(params_of(theirs), params_of(ours), strict=True)):
        if not a.numel():
            continue
        assert b.dtype is dtype and (b.detach().double() != start[i]).any()
        gap = ((a.detach().double() - b.detach().double()).abs() / (largest[i] + travel[i])).max() / ULP[dtype]
        assert gap <= per_step * STEPS, f"{SHAPES[i]}: p is {gap:.3g} ulp from torch's"
        state, other = ours.state[b], theirs.state[a]
        assert state.keys() == other.keys() and state["step"] == other["step"] == STEPS
        gap = ((state["exp_avg"] - other["exp_avg"]).double().abs() / largest_grad[i]).max() / ULP[dtype]
        assert gap <= 8 * per_step, f"{SHAPES[i]}: exp_avg is {gap:.3g} ulp of the largest gradient from torch's"
        for key in state.keys() - {"step", "exp_avg"}:
            off = (state[key] / other[key] - 1).abs().max()
            allowed = SQUARES_OFF.get(backend, 2e-5) if dtype == F32 else 1e-12
            assert off <= allowed, f"{SHAPES[i]}: {key} is off by {off:.3g}"


@pytest.mark.parametrize("index", range(len(inputs(F16))), ids=[label(kwargs) for kwargs in inputs(F16)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_torchs_inputs_in_sixteen_bits(index, dtype, backend, seed):
    """Each step from one state beside torch's fused one, which computes in float32 too: one ulp, where a result lies
    half-way between two numbers of 16 bits.
    """
    kwargs = {**accepted(inputs(dtype)[index]), "fused": True}
    theirs, ours = theirs_and_ours(kwargs, dtype, backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    differ = total = 0
    for step in range(1, 11):
        set_grads(theirs, ours, generator)
        before = first_moments(ours)
        with torch.no_grad():
            for a, b in zip(params_of(theirs), params_of(ours), strict=True):
                a.copy_(b)
                for key, value in ours.state[b].items() if b in ours.state else ():
                    theirs.state[a][key].copy_(value)
        theirs.step()
        ours.step()
        for i, (a, b) in enumerate(zip(params_of(theirs), params_of(ours), strict=True)):
            moment, update = sizes(ours, b, before[i], kwargs, step)
            squares_off = SQUARES_OFF.get(backend, 2e-5)
            slack = {"param": squares_off * update, "exp_avg": 2**-20 * moment}
            for key, y in {"param": a.detach(), **theirs.state[a]}.items():
                x = b.detach() if key == "param" else ours.state[b][key]
                assert x.dtype is y.dtype is (F32 if key == "step" else dtype)
                off = (x.double() - y.double()).abs()
                one_ulp = ulp_at(y.double().abs().maximum(x.double().abs()), y.dtype)
                allowed = 0 * off if key == "step" else one_ulp + slack.get(key, squares_off * y.double().abs())
                assert (off <= allowed).all(), f"{SHAPES[i]}, step {step}: {key}"
                differ, total = differ + int((off > 0).sum()), total + off.numel()
    assert differ <= 0.02 * total, f"{differ} of {total} values differ at all"


# Error inputs.


def errors(device):
    """torch's error inputs; those for CUDA need no more than a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *size, device=None, **kwargs: empty(*size, **kwargs))
        return INFO.optim_error_inputs_func(device, F32)


ERRORS = [(device, i) for device in ("cpu", "cuda") for i in range(len(errors(device)))]


@pytest.mark.parametrize(
    "device, index", ERRORS, ids=[errors(device)[i].optimizer_error_input.desc for device, i in ERRORS]
)
def test_torchs_error_inputs_give_torchs_errors(device, index, backend):
    case = errors(device)[index]
    given, kind, text = case.optimizer_error_input, case.error_type, case.error_regex
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    warns = issubclass(kind, Warning)
    raised = pytest.warns if warns else pytest.raises
    with raised(kind, match=text):
        torch.optim.AdamW(params, **given.kwargs)
    # torch warns and would step the parameter twice; ours warns too, and then refuses.
    also = pytest.raises(ValueError, match="appears twice") if warns else contextlib.nullcontext()
    with raised(kind, match=text), also:
        FusedGradDropAdamW(params, **given.kwargs, mask=None, backend=backend)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": -0.5}, {"lr": torch.tensor(-0.5)}, {"lr": torch.ones(2, 2)}, {"eps": -1e-9}, {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"betas": (0, 0.9)}, {"betas": (torch.zeros(2), torch.zeros(2))},
        {"betas": (0.9,)}, {"lr": "0.1"}, {"lr": None}, {"fused": True, "foreach": True}, {"params": []},
        {"params": [torch.ones(3).requires_grad_() * 2]}, {"params": ["weight"]}, {"params": 3},
    ],
    ids=str,
)  # fmt: skip
def test_more_that_torch_refuses_is_refused_alike(kwargs):
    kwargs = {"params": [torch.nn.Parameter(torch.ones(3))], **kwargs}
    with pytest.raises(Exception) as theirs:
        torch.optim.AdamW(**kwargs)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        FusedGradDropAdamW(**kwargs, mask=None)
