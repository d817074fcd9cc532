"""Bad arguments: refused with name, value and remedy, and nothing has changed: policies, options, blocks, backends."""

import dataclasses
import re
from math import inf, nan

import pytest
import torch
from torch import nn
from toy import Encoder, named_params, random_grads, refused

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
)
from graddrop_kernels.backends import cpu
from graddrop_kernels.policies import from_json

# Policies and schedules, before any optimizer is there.


@pytest.mark.parametrize("p", [-0.1, 1, 1.0, 1.5, nan, inf, True, "0.2", None, torch.tensor(0.5)], ids=repr)
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
        (lambda: FixedMask({"weight": torch.ones(3).bool()}, scale=nan), [r"FixedMask\(scale=\)", "got nan"]),
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
    *(("lr", value, "lr|learning rate") for value in (-1e-3, nan, inf, -inf)),
    *(("eps", value, "eps") for value in (-1e-12, nan, inf)),
    *(("weight_decay", value, "weight_decay") for value in (-0.1, nan, inf)),
    *(("betas", value, "beta") for value in ((-0.1, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, 1.5), (nan, 0.9), (0.9, nan))),
    *(("seed", value, "seed") for value in (-1, 2**64, 1.5, True, "0", None)),
    ("masked", "freeze", "masked.*'gradient', 'frozen', 'update'. or None"),
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


@pytest.mark.parametrize("value", [torch.float16, torch.int8, "float16", "torch.float16", "float64", 32], ids=repr)
def test_moment_dtype(value):
    with refused(ValueError, "moment_dtype must be None .*, torch.float32 or torch.bfloat16", re.escape(repr(value))):
        FusedGradDropAdamW(named_params(), moment_dtype=value)


@pytest.mark.parametrize("name", ["capturable"])
def test_capturable(name):
    with refused(ValueError, f"{name}=True needs parameters on a GPU"):
        FusedGradDropAdamW(named_params(), **{name: True})
    with refused(ValueError, f"{name}=True needs parameters on a GPU"):
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
    optimizer.backend = "cpu"
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
    with refused(ValueError, "^GRADDROP_BACKEND='quick' is unknown; .* 'reference'", optimizer=optimizer):
        optimizer.step()


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"unavailable": lambda: "it is broken; mend it"}, "cannot run here: it is broken; mend it$"),
        (
            {"unavailable": lambda: None, "devices": ("moon",)},
            "works on moon tensors, not on cpu; use GRADDROP_BACKEND='auto'$",
        ),
    ],
    ids=["broken", "foreign"],
)
def test_an_override_that_does_not_run_or_fit(changes, part, monkeypatch, trained):
    """The message names the variable, which may have been forgotten, and not the argument, which was not given."""
    _, optimizer = trained
    monkeypatch.setitem(backends._BY_NAME, "cpu", dataclasses.replace(backends._BY_NAME["cpu"], **changes))
    monkeypatch.setenv("GRADDROP_BACKEND", "cpu")
    with refused(RuntimeError, "^GRADDROP_BACKEND='cpu' " + part, optimizer=optimizer):
        optimizer.step()


def test_an_empty_override_is_none(monkeypatch, trained):
    _, optimizer = trained
    monkeypatch.setenv("GRADDROP_BACKEND", "")
    optimizer.step()


def test_a_dtype_that_no_backend_takes(monkeypatch):
    monkeypatch.delenv("GRADDROP_BACKEND", raising=False)
    weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))
    optimizer = FusedGradDropAdamW([("weight", weight)])
    weight.grad = torch.ones(4).to(torch.float8_e4m3fn)
    supported = "float32, float64, bfloat16, float16, complex64 and complex128 are supported"
    with refused(TypeError, "float8_e4m3fn", supported, optimizer=optimizer):
        optimizer.step()
