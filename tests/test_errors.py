"""Bad input: refused with name, value and remedy, and nothing has changed: parameters, gradients, state, groups."""

import contextlib
import copy
import re
import warnings

import pytest
import torch
from test_optimizer import Encoder, bits, build, random_grads, snapshot, train
from torch import nn

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    backends,
    param_groups,
)
from graddrop_kernels.backends import cpu
from graddrop_kernels.optimizer import GROUP_DEFAULTS
from graddrop_kernels.policies import from_json

NAN, INF = float("nan"), float("inf")


@contextlib.contextmanager
def refused(kind, *parts, optimizer=None, params=()):
    """The block raises ``kind`` with a message that matches every part (regular expressions), and changes nothing."""
    params = list(params)
    everything = lambda: (optimizer and snapshot(optimizer), [(bits(param), bits(param.grad)) for param in params])
    before = everything()
    with pytest.raises(kind) as error:
        yield
    for part in parts:
        assert re.search(part, str(error.value)), (part, str(error.value))
    assert everything() == before


def named_params(*names):
    return [(name, nn.Parameter(torch.linspace(1, 2, 6).view(2, 3))) for name in names or ("weight",)]


@pytest.fixture(params=["fresh", "after steps"])
def trained(request, seed):
    """(model, optimizer) with gradients, before its first step and after three."""
    model, optimizer = build("graddrop")
    if request.param == "after steps":
        train(optimizer, model.parameters(), range(3), seed)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    return model, optimizer


# Policies and schedules, before any optimizer is there.


@pytest.mark.parametrize("p", [-0.1, 1, 1.0, 1.5, NAN, INF, True, "0.2", None, torch.tensor(0.5)], ids=repr)
@pytest.mark.parametrize("policy", [GradDrop, GaussianGradDrop, LayerGradDrop])
def test_p_outside_0_1(policy, p):
    with refused(ValueError, re.escape("p must be a drop probability in [0, 1), got ") + re.escape(repr(p))):
        policy(p=p)


@pytest.mark.parametrize("policy", [GradDrop, GaussianGradDrop, LayerGradDrop])
def test_p_that_rounds_away_names_the_nearest_usable_one(policy):
    with refused(ValueError, "1e-09", "use p = 0 or p >= 1.52588e-05"):
        policy(p=1e-9)
    with refused(ValueError, "0.999999", "the largest usable p is 0.999985"):
        policy(p=0.999999)
    with refused(ValueError, r"p at epoch 0 must be .* got 2"):
        policy(p=lambda epoch: 2)


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: GradDropEpoch(), [r"GradDropEpoch\(epochs=\)", "int >= 1, got None"]),
        (lambda: GradDropEpoch(epochs=0), [r"GradDropEpoch\(epochs=\)", "got 0"]),
        (lambda: GradDropEpoch(epochs=-3), ["got -3"]),
        (lambda: GradDropEpoch(epochs=3.0), ["got 3.0"]),
        (lambda: GradDropEpoch(epochs=True), ["got True"]),
        (lambda: GradDropEpoch(epochs=4097), ["at most 4096", "4097"]),
        (
            lambda: GradDropEpoch(3, storage="bits"),
            [r"GradDropEpoch\(storage=\)", "'bitpacked' or 'recompute'", "'bits'"],
        ),
        (lambda: GradFreeze(), [r"GradFreeze\(epochs=\)", "got None"]),
        (lambda: GradFreeze(epochs=0), [r"GradFreeze\(epochs=\)", "got 0"]),
        (lambda: GradFreeze(epochs=3, blocks_per_epoch=0), [r"GradFreeze\(blocks_per_epoch=\)", "got 0"]),
        (
            lambda: GradFreeze(epochs=3, direction="up"),
            [r"GradFreeze\(direction=\)", "'top_down' or 'bottom_up'", "'up'"],
        ),
        (lambda: LinearAnneal(epochs=0), [r"LinearAnneal\(epochs=\)", "got 0"]),
        (lambda: GradDrop(every="batch"), [r"GradDrop\(every=\)", "'step' or 'epoch'", "'batch'"]),
        (lambda: LayerGradDrop(every=None), [r"LayerGradDrop\(every=\)", "'step' or 'epoch'", "None"]),
        (lambda: LayerGradDrop(layers=[]), [r"LayerGradDrop\(layers=\)", "encoder.layer.*"]),
        (lambda: GradFreeze(3, layers=[3]), [r"GradFreeze\(layers=\)", "encoder.layer.*", r"\(3,\)"]),
        (lambda: FixedMask({}), [r"FixedMask\(masks=\)", "non-empty mapping"]),
        (lambda: FixedMask([torch.ones(3).bool()]), [r"FixedMask\(masks=\)", "non-empty mapping"]),
        (lambda: FixedMask({"weight": torch.ones(3)}), ["'weight'", "bool", "float32", r"\(weights != 0\)"]),
        (lambda: FixedMask({"weight": [True, False]}), ["'weight'", "bool", "list"]),
        (lambda: FixedMask({"weight": torch.ones(3).bool()}, scale=0), [r"FixedMask\(scale=\)", "got 0"]),
        (lambda: FixedMask({"weight": torch.ones(3).bool()}, scale=-1.5), [r"FixedMask\(scale=\)", "got -1.5"]),
        (lambda: FixedMask({"weight": torch.ones(3).bool()}, scale=NAN), [r"FixedMask\(scale=\)", "got nan"]),
        (lambda: FixedMask({"weight": torch.ones(3).bool()}, scale=True), [r"FixedMask\(scale=\)", "got True"]),
    ],
)
def test_policy_arguments(make, parts):
    with refused(ValueError, *parts):
        make()


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            '{"policy":"GradDropout","p":0.2}',
            ["'GradDropout'", "GradDrop, GaussianGradDrop, LayerGradDrop, GradDropEpoch, GradFreeze, FixedMask"],
        ),
        ('{"p":0.2}', ["unknown mask policy None"]),
        ('{"policy":"GradDrop","p":1.5}', ["got 1.5"]),
        ("graddrop", ["graddrop", "GradDrop"]),
        ("", ["GradDrop"]),
        ("0.2", ["0.2", "GradDrop"]),
        ('{"policy":"GradDrop","q":0.2}', ["'?q'?"]),
        ('{"policy":"GradDrop","p":{"schedule":"Cosine"}}', ["Cosine"]),
    ],
)
def test_a_string_that_is_no_policy(text, parts):
    with refused(ValueError, *parts):
        from_json(text)
    named = named_params()
    with refused(ValueError, *parts, params=[named[0][1]]):
        FusedGradDropAdamW(named, mask=text)


# Constructor arguments, of a group, and set later.

BAD_VALUES = [
    *(("lr", value, "lr|learning rate") for value in (-1e-3, NAN, INF, -INF)),
    *(("eps", value, "eps") for value in (-1e-12, NAN, INF)),
    *(("weight_decay", value, "weight_decay") for value in (-0.1, NAN, INF)),
    *(("betas", value, "beta") for value in ((-0.1, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, 1.5), (NAN, 0.9), (0.9, NAN))),
    *(("seed", value, "seed") for value in (-1, 2**64, 1.5, True, "0", None)),
    ("masked", "freeze", "masked.*'gradient', 'frozen' or None"),
    ("bias_correction", "none", "bias_correction.*'active' or 'global'"),
]
bad_values = pytest.mark.parametrize(
    "name, value, part", BAD_VALUES, ids=[f"{name}={value!r}" for name, value, _ in BAD_VALUES]
)


def shown(value):
    """How a message shows the value; one of two betas is enough."""
    parts = value if isinstance(value, tuple) else (value,)
    return "|".join(re.escape(repr(part)) for part in parts if not (isinstance(value, tuple) and part == 0.9))


@bad_values
def test_hyper_parameters_of_the_constructor(name, value, part):
    named = named_params()
    with refused(ValueError, part, shown(value), params=[named[0][1]]):
        FusedGradDropAdamW(named, **{name: value})


@bad_values
def test_hyper_parameters_of_a_group(name, value, part):
    named = named_params("a", "b")
    with refused(ValueError, part, shown(value), "group 1", params=[param for _, param in named]):
        FusedGradDropAdamW([{"params": named[:1]}, {"params": named[1:], name: value}])


@bad_values
def test_hyper_parameters_set_later(trained, name, value, part):
    _, optimizer = trained
    optimizer.param_groups[2][name] = value
    with refused(ValueError, part, shown(value), "group 2", optimizer=optimizer):
        optimizer.step()


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "float64", 32], ids=repr)
def test_moment_dtype(value):
    with refused(ValueError, r"moment_dtype must be None .* or torch.float32", re.escape(repr(value))):
        FusedGradDropAdamW(named_params(), moment_dtype=value)


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_capturable_and_differentiable(name):
    with refused(ValueError, f"{name}=True is not supported"):
        FusedGradDropAdamW(named_params(), **{name: True})
    with refused(ValueError, f"{name}=True is not supported"):
        FusedGradDropAdamW([{"params": named_params(), name: True}])


NO_POLICIES = [0.2, 1, True, GradDrop, {"p": 0.2}, torch.ones(2, 3).bool(), lambda epoch: 0.5]


@pytest.mark.parametrize("mask", NO_POLICIES, ids=lambda mask: type(mask).__name__)
def test_a_mask_that_is_no_policy(mask):
    with refused(
        TypeError,
        r"mask= must be a policy such as GradDrop\(p=0.2\), or None for plain AdamW; got ",
        re.escape(repr(mask)),
    ):
        FusedGradDropAdamW(named_params(), mask=mask)
    with refused(TypeError, "mask= must be a policy"):
        FusedGradDropAdamW([{"params": named_params(), "mask": mask}])


@pytest.mark.parametrize("masked", ["gradient", "frozen"])
def test_masked_does_not_apply_to_the_gaussian(masked):
    with refused(ValueError, f"masked='{masked}' does not apply to GaussianGradDrop", "leave it None"):
        FusedGradDropAdamW(named_params(), mask=GaussianGradDrop(), masked=masked)


def test_a_tensor_lr_with_foreach_is_refused_as_in_torch():
    for cls in (torch.optim.AdamW, FusedGradDropAdamW):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
            cls(named_params(), lr=torch.tensor(0.1), foreach=True)


# Parameters.


def flat_parameter():
    cls = type("FlatParameter", (nn.Parameter,), {})
    return cls(torch.ones(6))


def sharded_parameter():
    param = nn.Parameter(torch.ones(6))
    param.placements = ("Shard(dim=0)",)
    return param


@pytest.mark.parametrize(
    "make, kind, parts",
    [
        (
            lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64)),
            TypeError,
            ["'layer.bad'", "torch.complex64", "float32, float64, bfloat16 and f"],
        ),
        (
            lambda: nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False),
            TypeError,
            ["'layer.bad'", "torch.int32", "float32"],
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
        (flat_parameter, TypeError, ["'layer.bad'", "FlatParameter", "shard"]),
        (sharded_parameter, TypeError, ["'layer.bad'", "shard"]),
        (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, ["non-leaf"]),
        (lambda: "weight", TypeError, ["only optimize Tensors"]),
    ],
    ids=["complex", "int", "expanded", "overlapping", "flat", "sharded", "non-leaf", "str"],
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


# Blocks.

BLOCK_POLICIES = [LayerGradDrop(), GradFreeze(epochs=3)]


@pytest.mark.parametrize("policy", BLOCK_POLICIES, ids=repr)
def test_a_block_policy_needs_to_know_the_blocks(policy):
    model = Encoder()
    remedies = [re.escape("graddrop_kernels.param_groups(model)"), re.escape("layers=['encoder.layer.*']")]
    for params in (model.parameters(), model.named_parameters(), [{"params": model.parameters()}]):
        with refused(ValueError, type(policy).__name__, *remedies, params=model.parameters()):
            FusedGradDropAdamW(params, mask=policy)


@pytest.mark.parametrize(
    "make", [lambda layers: LayerGradDrop(layers=layers), lambda layers: GradFreeze(epochs=3, layers=layers)]
)
def test_layers_need_names_and_must_find_something(make):
    model = Encoder()
    with refused(
        ValueError, r"layers=...\) needs parameter names", r"model.named_parameters\(\) instead of model.parameters\(\)"
    ):
        FusedGradDropAdamW(model.parameters(), mask=make(["layer.*"]))
    with refused(ValueError, re.escape("'encoder.layers.*'"), re.escape("'layer.*'")):  # the nearest that there is
        FusedGradDropAdamW(model.named_parameters(), mask=make(["layer.*", "encoder.layers.*"]))
    with refused(ValueError, "inside block"):
        FusedGradDropAdamW(model.named_parameters(), mask=make(["layer.*", "layer.*.linear"]))


# FixedMask against the parameters.


@pytest.mark.parametrize(
    "masks, parts",
    [
        ({"layer.0.linear.wieght": (6, 6)}, ["'layer.0.linear.wieght'", "'layer.0.linear.weight'"]),
        ({"layer.0.linear.weight": (6, 6), "pooler": (6,)}, ["'pooler'"]),
        ({"layer.0.linear.weight": (6, 5)}, ["'layer.0.linear.weight'", r"\(6, 5\)", r"\(6, 6\)"]),
        ({"layer.0.linear.weight": (36,)}, ["'layer.0.linear.weight'", r"\(36,\)", r"\(6, 6\)"]),
    ],
)
def test_fixed_masks_that_do_not_fit(masks, parts):
    model = Encoder()
    policy = FixedMask({name: torch.ones(shape).bool() for name, shape in masks.items()})
    with refused(ValueError, *parts, params=model.parameters()):
        FusedGradDropAdamW(model.named_parameters(), mask=policy)


# Backends.


def test_a_backend_that_does_not_exist():
    with refused(ValueError, "backend='gpu' is unknown", "'auto'", *(f"'{row.name}'" for row in backends.BACKENDS)):
        FusedGradDropAdamW(named_params(), backend="gpu")


def test_a_backend_whose_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    cpu._load.cache_clear()
    try:
        with refused(
            RuntimeError,
            "backend='cpu' cannot run here",
            "not compiled",
            r"install a C\+\+ compiler and run pip install again",
        ):
            FusedGradDropAdamW(named_params(), backend="cpu")
        with pytest.raises(RuntimeError, match="the cpu backend cannot run: .* pip install"):
            cpu.library()
    finally:
        cpu._load.cache_clear()


def test_a_library_that_is_broken(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_text("not a library")
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    cpu._load.cache_clear()
    try:
        with refused(RuntimeError, "backend='cpu' cannot run here", "_cpu.so cannot be loaded with torch"):
            FusedGradDropAdamW(named_params(), backend="cpu")
    finally:
        cpu._load.cache_clear()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_named_backend_that_does_not_fit(monkeypatch, steps, seed):
    """float64 is not the compiled backend's: asked for, it is not silently replaced."""
    table = tuple(backends.Backend(**{**vars(row), "unavailable": lambda: None}) for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "_BY_NAME", {row.name: row for row in table})
    named = [("single", nn.Parameter(torch.ones(4))), ("double", nn.Parameter(torch.ones(4, dtype=torch.float64)))]
    optimizer = FusedGradDropAdamW(named, mask=GradDrop(p=0.5))
    for _ in range(steps):
        random_grads([param for _, param in named], torch.Generator().manual_seed(seed))
        optimizer.step()
    random_grads([param for _, param in named], torch.Generator().manual_seed(seed))
    optimizer._backend = "cpu"
    with refused(
        RuntimeError,
        "backend='cpu' does not take float64 parameters with float64 moments",
        "use backend='auto'",
        optimizer=optimizer,
    ):
        optimizer.step()


def test_an_override_that_does_not_exist(monkeypatch, trained):
    _, optimizer = trained
    monkeypatch.setenv("GRADDROP_BACKEND", "quick")
    with refused(ValueError, "'quick' is unknown", optimizer=optimizer):
        optimizer.step()


def test_a_dtype_that_no_backend_takes(monkeypatch):
    monkeypatch.delenv("GRADDROP_BACKEND", raising=False)
    weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    optimizer = FusedGradDropAdamW([("weight", weight)])
    weight.grad = torch.ones(4).to(torch.float8_e4m3fn)
    with refused(
        TypeError, "float8_e4m3fn", "float32, float64, bfloat16 and float16 are supported", optimizer=optimizer
    ):
        optimizer.step()


# mask(), set_epoch().


def test_mask_of_an_unknown_parameter(trained):
    _, optimizer = trained
    with refused(KeyError, "'layer.9.linear.weight' is not a parameter of this optimizer", optimizer=optimizer):
        optimizer.mask("layer.9.linear.weight")
    with refused(KeyError, "this tensor is not a parameter of this optimizer", optimizer=optimizer):
        optimizer.mask(torch.ones(6, 6))


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1", None, NAN], ids=repr)
def test_set_epoch(epoch):
    _, optimizer = build("epoch")
    with refused(
        ValueError,
        r"set_epoch\(epoch\) needs the number of the epoch, an int >= 0, got ",
        re.escape(repr(epoch)),
        optimizer=optimizer,
    ):
        optimizer.set_epoch(epoch)


def test_a_schedule_without_a_usable_p_at_an_epoch():
    named = named_params("a", "b")
    optimizer = FusedGradDropAdamW(
        [
            {"params": named[:1], "mask": GradDropEpoch(epochs=9)},
            {"params": named[1:], "mask": GradDrop(p=lambda epoch: 0.3 * epoch)},
        ]
    )
    optimizer.set_epoch(3)
    with refused(ValueError, r"p at epoch 4 must be a drop probability in \[0, 1\), got 1.2", optimizer=optimizer):
        optimizer.set_epoch(4)


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "policy",
    ["graddrop-epoch", "graddrop-anneal", "graddrop-callable", "gaussian", "layer-epoch", "epoch", "toggle", "freeze"],
)
def test_an_epoch_policy_without_set_epoch_warns_exactly_once(policy, seed):
    model, optimizer = build(policy)
    messages = warned(lambda: train(optimizer, model.parameters(), range(9), seed, set_epoch=False))
    assert len(messages) == 1
    assert "set_epoch(epoch) was not called" in messages[0] and "at the start of every epoch, 0 first" in messages[0]
    model, optimizer = build(policy)
    assert not warned(lambda: train(optimizer, model.parameters(), range(9), seed))


@pytest.mark.parametrize("policy", ["plain", "graddrop", "layer", "fixed"])
def test_other_policies_need_no_set_epoch(policy, seed):
    model, optimizer = build(policy)
    assert not warned(lambda: train(optimizer, model.parameters(), range(3), seed, set_epoch=False))


@pytest.mark.parametrize("world_size, expected", [(1, 0), (2, 1)])
def test_masks_without_names_warn_once_where_several_processes_train(monkeypatch, world_size, expected):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    model = Encoder()
    groups = [{"params": model.layer.parameters()}, {"params": model.head.parameters()}]
    messages = warned(lambda: FusedGradDropAdamW(groups))
    assert len(messages) == expected and all("pass model.named_parameters()" in message for message in messages)
    assert not warned(lambda: FusedGradDropAdamW(model.named_parameters()))
    assert not warned(lambda: FusedGradDropAdamW(model.parameters(), mask=None))


def test_toggle_past_its_end_warns_once(seed):
    model, optimizer = build("toggle")

    def two_epochs_too_many():
        for epoch in (3, 4, 4, 4):
            optimizer.set_epoch(epoch)
            random_grads(model.parameters(), torch.Generator().manual_seed(seed))
            optimizer.step()

    messages = warned(two_epochs_too_many)
    assert len(messages) == 1 and "after the last epoch of GradDropEpoch(epochs=4, toggle=True)" in messages[0]
    _, optimizer = build("toggle")
    assert len(warned(lambda: [optimizer.set_epoch(epoch) for epoch in range(10)])) == 1


# State dicts.


@pytest.mark.parametrize(
    "key, theirs, ours",
    [
        ("mask", GradDrop(p=0.3), GradDrop(p=0.31)),
        ("mask", GradDrop(p=0.3), GradDrop(p=0.3, every="epoch")),
        ("mask", GradDrop(), None),
        ("mask", None, GradDrop()),
        ("mask", GradDropEpoch(epochs=3), GradDropEpoch(epochs=3, toggle=True)),
        ("mask", GradDrop(p=LinearAnneal(epochs=3)), GradDrop(p=LinearAnneal(epochs=4))),
        ("mask", FixedMask({"a": torch.ones(2, 3).bool()}), FixedMask({"a": torch.zeros(2, 3).bool()})),
        ("seed", 3, 4),
        ("masked", "frozen", None),
        ("bias_correction", "global", "active"),
    ],
    ids=str,
)
def test_a_state_dict_of_another_masking(key, theirs, ours, seed):
    def optimizer_of(value, steps):
        named = named_params("a", "b")
        groups = [
            {"params": named[:1], key: GROUP_DEFAULTS[key]},
            {"params": named[1:]},
        ]  # the second group is the one that differs
        if isinstance(value, FixedMask):
            groups = [{"params": named}]
        optimizer = FusedGradDropAdamW(groups, **{key: value})
        optimizer.set_epoch(0)
        for _ in range(steps):
            random_grads(
                [param for group in optimizer.param_groups for param in group["params"]],
                torch.Generator().manual_seed(seed),
            )
            optimizer.step()
        return optimizer

    saved = optimizer_of(theirs, 3).state_dict()
    optimizer = optimizer_of(ours, 1)
    in_file = theirs.to_json() if hasattr(theirs, "to_json") else theirs
    here = ours.to_json() if hasattr(ours, "to_json") else ours
    group = f"group {len(optimizer.param_groups) - 1}"
    before = copy.deepcopy(saved)
    with refused(
        ValueError,
        re.escape(f"{key}={in_file!r}"),
        re.escape(f"{key}={here!r}"),
        group,
        "strict=False",
        optimizer=optimizer,
    ):
        optimizer.load_state_dict(saved)
    assert str(saved) == str(before)
    optimizer.load_state_dict(saved, strict=False)
    for group in optimizer.param_groups:
        assert group["completed_steps"] == 3
        for param in group["params"]:
            assert optimizer.state[param]["step"].item() == 3
    assert optimizer.param_groups[-1][key] == here  # goes on under this one's


def one_group(*shapes):
    return FusedGradDropAdamW([nn.Parameter(torch.ones(shape)) for shape in shapes], mask=None)


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: FusedGradDropAdamW(named_params("a", "c")), ["group 0", r"lacks \['b'\]", r"has \['c'\]"]),
        (lambda: FusedGradDropAdamW(named_params("a")), ["group 0", r"lacks \['b'\]"]),
        (lambda: FusedGradDropAdamW(named_params("a", "b", "c")), ["group 0", r"has \['c'\]"]),
        (
            lambda: FusedGradDropAdamW([{"params": named_params("a")}, {"params": named_params("b")}]),
            ["has 2 parameter groups", "has 1"],
        ),
        (lambda: torch.optim.AdamW([param for _, param in named_params("a", "b", "c")]), ["size|number"]),
    ],
    ids=["names", "fewer", "more", "groups", "nameless"],
)
def test_a_state_dict_of_other_parameters(make, parts, seed):
    other = make()
    for group in other.param_groups:
        random_grads(group["params"], torch.Generator().manual_seed(seed))
    other.step()
    optimizer = FusedGradDropAdamW(named_params("a", "b"))
    with refused(ValueError, *parts, optimizer=optimizer):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("theirs, ours", [((4, 2), (8, 2)), ((8, 2), (4, 2)), ((4, 2), (2, 4)), ((8,), (4, 2))])
def test_a_state_dict_of_other_shapes(theirs, ours):
    """The kernels get pointers: moments of another size than the parameter's must never reach them."""
    other = one_group(theirs)
    other.param_groups[0]["params"][0].grad = torch.ones(theirs)
    other.step()
    optimizer = one_group(ours)
    with refused(ValueError, re.escape(str(theirs)), re.escape(str(ours)), optimizer=optimizer):
        optimizer.load_state_dict(other.state_dict())


def test_a_state_dict_of_another_kind_of_optimizer():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    other = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    other.step()
    optimizer = one_group((3,))
    with refused((ValueError, KeyError), "exp_avg|step", optimizer=optimizer):
        optimizer.load_state_dict(other.state_dict())


def test_a_refusal_in_one_group_leaves_the_groups_before_it_alone(seed):
    """Everything is checked before anything is changed."""
    model = Encoder()
    optimizer = FusedGradDropAdamW(param_groups(model))
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    model.head.bias.data = model.head.bias.data.double()
    random_grads(
        [param for param in model.parameters() if param is not model.head.bias], torch.Generator().manual_seed(seed)
    )
    with refused(ValueError, "'head.bias'", optimizer=optimizer):
        optimizer.step()
