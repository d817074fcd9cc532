"""differentiable=True: derivatives through the step, those of torch's AdamW without a mask, and right with one."""

import pytest
import torch

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, GradDrop, GradDropEpoch, LayerGradDrop, TrainRows

F64 = torch.float64
ARGUMENTS = {"betas": (0.75, 0.96875), "eps": 1e-3}
POLICIES = {
    "plain": (None, {}),
    "graddrop": (GradDrop(0.3), {}),
    "frozen": (GradDrop(0.4), {"masked": "frozen"}),
    "gaussian": (GaussianGradDrop(0.3), {}),
    "layer": (LayerGradDrop(0.5, layers=["layer.*"]), {}),
    "epoch": (GradDropEpoch(3), {}),
    "rows": (TrainRows({"layer.0.weight": [1, 2, 4]}), {}),
}
SHAPE = (5, 4)


def values(seed, count, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, dtype=dtype, generator=generator) for _ in range(count)]


def stepped(make, param, grads, lr, weight_decay=0.2):
    """The parameter after a step a gradient, by an optimizer over a copy of ``param``; differentiable by all."""
    param = param.clone()
    optimizer = make(param, lr)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param


def theirs(**more):
    return lambda param, lr: torch.optim.AdamW([param], lr=lr, **ARGUMENTS, differentiable=True, **more)


def ours(policy, seed, **more):
    mask, masked = POLICIES[policy]

    def make(param, lr):
        optimizer = FusedGradDropAdamW(
            [("layer.0.weight", param)], lr=lr, **ARGUMENTS, **masked, **more, mask=mask, seed=seed,
            differentiable=True,
        )  # fmt: skip
        optimizer.set_epoch(1)
        return optimizer

    return make


@pytest.mark.parametrize("more", [{}, {"maximize": True}], ids=str)
def test_derivatives_are_torchs(more, seed):
    """By the parameter, each of two gradients, lr and weight_decay. torch's bias corrections are float32 here; with
    amsgrad its second step cannot be differentiated.
    """
    inputs = [*values(seed, 3), torch.tensor(0.03, dtype=F64), torch.tensor(0.2, dtype=F64)]
    found = []
    for make in (theirs(**more), ours("plain", seed, **more)):
        param, *grads, lr, decay = (value.clone().requires_grad_() for value in inputs)
        out = stepped(make, param, [grad * grad for grad in grads], lr, decay)
        found.append(torch.autograd.grad(out.square().sum(), [param, *grads, lr, decay]))
    largest = [expected.abs().max() for expected in found[0]]
    assert min(largest[:3]) > 1e-3
    largest[3:] = largest[:1] * 2  # those by lr and weight_decay are sums over all elements, which may cancel
    for expected, actual, size in zip(*found, largest):
        assert (actual - expected).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("more", [{}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_derivatives_are_those_of_differences(policy, more, seed):
    """gradcheck: the mask is a constant of the function."""
    param, *grads = (value.requires_grad_() for value in values(seed, 3))
    lr, decay = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.03, 0.2))
    function = lambda param, first, second, *numbers: stepped(
        ours(policy, seed, **more), param, [first, second], *numbers
    )
    assert torch.autograd.gradcheck(function, (param, *grads, lr, decay))


def test_a_dropped_gradient_has_no_influence(seed):
    param, grad = values(seed, 2)
    lr = torch.tensor(0.03, dtype=F64)
    grad.requires_grad_()
    stepped(ours("graddrop", seed), param, [grad], lr).sum().backward()
    keep = FusedGradDropAdamW([("layer.0.weight", torch.nn.Parameter(param))], mask=GradDrop(0.3), seed=seed)
    keep = keep.mask("layer.0.weight", step=0)
    assert (grad.grad[~keep] == 0).all() and (grad.grad[keep] != 0).all() and 0.2 < keep.double().mean() < 1


def test_results_are_those_of_a_step_that_is_not_recorded(seed):
    for dtype in (torch.float32, F64):
        param, *grads = values(seed, 4, dtype)
        recorded = stepped(ours("graddrop", seed), param.clone().requires_grad_(), grads, 0.03)
        assert recorded.requires_grad
        plain = torch.nn.Parameter(param.clone())
        optimizer = FusedGradDropAdamW(
            [("layer.0.weight", plain)], lr=0.03, **ARGUMENTS, weight_decay=0.2, mask=GradDrop(0.3), seed=seed,
            backend="reference",
        )
        for grad in grads:
            plain.grad = grad
            optimizer.step()
        assert torch.equal(recorded, plain)


def test_clipping_is_differentiated_too(seed):
    param, grad = (value.requires_grad_() for value in values(seed, 2))
    lr = torch.tensor(0.03, dtype=F64, requires_grad=True)
    function = lambda *inputs: stepped(ours("graddrop", seed, max_grad_norm=0.5), inputs[0], [inputs[1]], inputs[2])
    assert torch.autograd.gradcheck(function, (param, grad, lr))


def test_what_is_refused(seed):
    with pytest.raises(ValueError, match="differentiable=True runs on the reference only: leave backend='auto'"):
        FusedGradDropAdamW([torch.nn.Parameter(torch.ones(3))], differentiable=True, backend="exact")
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedGradDropAdamW([param], mask=None)
    optimizer.param_groups[0]["differentiable"], param.grad = True, torch.ones(3)
    with pytest.raises(ValueError, match="differentiable of parameter group 0 is True, the optimizer's is False"):
        optimizer.step()
    assert not optimizer.state
