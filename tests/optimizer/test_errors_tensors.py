"""Parameters and gradients that cannot be stepped: refused with name, value and remedy, and nothing has changed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from toy import bits, named_params, random_grads, refused

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GaussianGradDrop, LayerGradDrop

# Parameters.


@pytest.mark.parametrize(
    "make, kind, parts",
    [
        (
            lambda: nn.Parameter(torch.ones(3, dtype=torch.complex32)),
            TypeError,
            ["'layer.bad'", "torch.complex32", "float32, float64, bfloat16, float16, complex64 and complex128 are"],
        ),
        (
            lambda: nn.Parameter(torch.ones(1, 3).expand(4, 3)),
            ValueError,
            ["'layer.bad'", "overlapping", r"\(4, 3\)", r"\(0, 1\)", r"\.clone\(\)"],
        ),
        (
            lambda: nn.Parameter(torch.ones(10).as_strided((4, 3), (2, 1))),
            ValueError,
            ["'layer.bad'", "overlapping", r"\(2, 1\)"],
        ),
        (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, ["non-leaf"]),
        (lambda: "weight", TypeError, ["only optimize Tensors"]),
    ],
    ids=["complex", "expanded", "overlapping", "non-leaf", "str"],
)
def test_parameters_that_cannot_be_stepped(make, kind, parts, trained):
    bad = ("module.layer.bad", make())
    with refused(
        kind, *parts, params=[param for _, param in [bad] if isinstance(param, torch.Tensor) and param.is_leaf]
    ):
        FusedGradDropAdamW([*named_params(), bad])
    _, optimizer = trained
    with refused(kind, *parts, optimizer=optimizer):
        optimizer.add_param_group({"params": [bad], "mask": None})
    optimizer.step()


def test_duplicate_parameters():
    weight = nn.Parameter(torch.ones(3))
    with refused(ValueError, "more than one parameter group", params=[weight]):
        FusedGradDropAdamW([{"params": [weight]}, {"params": [weight]}])
    with refused(ValueError, "twice|duplicate", params=[weight]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warning
        FusedGradDropAdamW([weight, weight])


def test_parameters_given_partly_with_names():
    with refused(ValueError, "with/without names"):
        FusedGradDropAdamW([*named_params(), nn.Parameter(torch.ones(3))])
    with refused(ValueError, "with/without names"):
        FusedGradDropAdamW([{"params": named_params()}, {"params": [nn.Parameter(torch.ones(3))]}])


def test_no_parameters():
    with refused(ValueError, "empty parameter list"):
        FusedGradDropAdamW([])


@pytest.mark.parametrize(
    "group, kind, part",
    [
        ({"params": 3}, TypeError, "iterable"),
        ([nn.Parameter(torch.ones(3))], TypeError, "dict"),
        ({"params": named_params("extra"), "lr": -1.0}, ValueError, "lr of parameter group 4"),
        (
            {"params": named_params("extra"), "mask": LayerGradDrop()},
            ValueError,
            r"pass graddrop_kernels.param_groups\(model\)",
        ),
        ({"params": named_params("extra"), "mask": LayerGradDrop(layers="extra.*")}, ValueError, r"extra\.\*"),
        (
            {"params": named_params("extra"), "mask": GaussianGradDrop(), "masked": "frozen"},
            ValueError,
            "GaussianGradDrop",
        ),
        (
            {"params": named_params("extra"), "mask": FixedMask({"extra": torch.ones(5).bool()})},
            ValueError,
            "'extra' has shape",
        ),
        ({"params": named_params("extra"), "mask": 0.5}, TypeError, "mask= must be a policy"),
        ({"params": named_params("extra"), "moment_dtype": torch.float16}, ValueError, "moment_dtype"),
    ],
    ids=["int", "list", "lr", "no blocks", "no such layers", "gaussian", "fixed", "mask", "moments"],
)
def test_a_group_that_is_refused_leaves_the_others_alone(group, kind, part, trained, seed):
    model, optimizer = trained
    twin, twins = copy.deepcopy((model, optimizer))
    with refused(kind, part, optimizer=optimizer):
        optimizer.add_param_group(group)
    for each, those in ((model, optimizer), (twin, twins)):
        random_grads(each.parameters(), torch.Generator().manual_seed(seed))
        those.step()
    assert [bits(param) for param in model.parameters()] == [bits(param) for param in twin.parameters()]


# Gradients, and parameters that have changed since.


# Some of these keep the parameter's memory, so that nothing but the one fact has changed since the step before.


def shrink(param):
    param.data = param.data.flatten()[:3]


def shrink_grad(param):
    whole, param.data = param.data, param.data.flatten()[:3]
    param.grad = torch.ones_like(param)
    param.data = whole


def other_dtype(param):
    param.data = param.data.double()


def overlap(param):
    param.data = torch.ones(1).expand(6, 6)
    param.grad = torch.ones(6, 6)


def other_grad_dtype(param):
    grad, whole = param.grad, param.data
    param.data = whole.half()
    param.grad = grad.half()
    param.data = whole


@pytest.mark.parametrize(
    "spoil, kind, parts",
    [
        (shrink, ValueError, [r"\(6, 6\) torch.float32", r"\(3,\) torch.float32"]),
        (shrink_grad, ValueError, [r"is \(3,\) torch.float32", r"\(6, 6\) torch.float32"]),
        (other_dtype, ValueError, ["torch.float32 on cpu", "torch.float64 on cpu"]),
        (other_grad_dtype, ValueError, [r"is \(6, 6\) torch.float16", r"\(6, 6\) torch.float32"]),
        (overlap, ValueError, ["overlapping memory", r"strides \(0, 0\)", r"\.clone\(\)"]),
    ],
)
def test_gradients_that_do_not_fit(trained, spoil, kind, parts):
    model, optimizer = trained
    spoil(model.layer[1].linear.weight)
    with refused(kind, "'layer.1.linear.weight'", *parts, optimizer=optimizer):
        optimizer.step()


def test_a_gradient_on_another_device():
    class Moved(nn.Parameter):
        grad = property(lambda self: torch.ones(3, device="meta"))  # torch itself refuses to set one

    weight = Moved(torch.ones(3))
    optimizer = FusedGradDropAdamW([("weight", weight)])
    with pytest.raises(
        ValueError,
        match=r"the gradient of 'weight' is \(3,\) torch.float32 on meta, its parameter .* on cpu; they must be alike",
    ):
        optimizer.step()
    assert not optimizer.state and (weight == 1).all()


@pytest.mark.parametrize("dense_steps", [0, 2])
def test_a_sparse_gradient(dense_steps):
    embedding = nn.Embedding(9, 4, sparse=True)
    dense = nn.Parameter(torch.ones(3))
    optimizer = FusedGradDropAdamW([("dense", dense), ("words.weight", embedding.weight)])
    dense.grad = torch.ones(3)
    for _ in range(dense_steps):
        embedding.weight.grad = torch.ones(9, 4)
        optimizer.step()
    embedding.weight.grad = None
    embedding(torch.tensor([1, 2])).sum().backward()
    with refused(RuntimeError, "'words.weight'", "sparse", "sparse=False", optimizer=optimizer):
        optimizer.step()


def test_a_parameter_resized_after_its_moments_were_made(trained):
    """The kernels get pointers: moments of another size than the parameter's must never reach them."""
    model, optimizer = trained
    if not optimizer.state:
        optimizer.step()
    param = model.layer[1].linear.weight
    shrink(param)
    param.grad = torch.ones_like(param)
    with refused((ValueError, RuntimeError), "'layer.1.linear.weight'", optimizer=optimizer):
        optimizer.step()


def test_a_wrapper_that_flattens():
    """Names, but another number of tensors: a group whose parameters a wrapper has put into one buffer."""
    named = named_params("a", "b", "c")
    optimizer = FusedGradDropAdamW(named)
    flat = nn.Parameter(torch.cat([param.detach().flatten() for _, param in named]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with refused(
        ValueError,
        "group 0 has 1 tensors but 3 names",
        "flattened",
        "build the optimizer from the tensors",
        optimizer=optimizer,
    ):
        optimizer.step()


def test_a_closure_that_raises(trained):
    _, optimizer = trained

    def closure():
        raise ZeroDivisionError("in the model")

    with refused(ZeroDivisionError, "in the model", optimizer=optimizer):
        optimizer.step(closure)


def test_moments_of_two_dtypes_are_refused(backend):
    """The kernels read both moments as one dtype: of two, they would write past the end of the narrower."""
    param = torch.nn.Parameter(torch.ones(9, dtype=torch.bfloat16))
    optimizer = FusedGradDropAdamW([("w", param)], backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["exp_avg_sq"] = optimizer.state[param]["exp_avg_sq"].float()
    with pytest.raises(ValueError, match="moments of 'w' have different dtypes"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 1
