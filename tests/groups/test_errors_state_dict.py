"""State dicts that do not fit: refused with what differs, and nothing has changed."""

import copy
import re

import pytest
import torch
from torch import nn
from toy import Encoder, named_params, random_grads, refused, state_bits

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradDropEpoch, LinearAnneal, param_groups
from graddrop_kernels.groups import load_state
from graddrop_kernels.optimizer import GROUP_DEFAULTS

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


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad", "Adamax"])
def test_a_state_dict_of_another_kind_of_optimizer(kind, steps):
    """Without state too, of which only the options would be taken over."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    other = getattr(torch.optim, kind)([weight], lr=0.1)
    for _ in range(steps):
        other.step()
    optimizer = one_group((3,))
    if kind == "Adamax" and not steps:  # has all of AdamW's options, as torch sees it, too
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.step()
        return
    with refused(ValueError, "another kind of optimizer's", optimizer=optimizer):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("late", ["a hook", "an interrupt", "a step that is no number", "no memory for a copy"])
def test_a_load_that_fails_late(late, seed, monkeypatch):
    """After torch has put the new state and groups in place."""
    model = Encoder()
    optimizer = FusedGradDropAdamW(param_groups(model), lr=0.25)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    other = FusedGradDropAdamW(param_groups(twin), lr=0.25)
    other.load_state_dict(saved)
    saved["param_groups"][1]["lr"] = 0.5
    kinds = {"an interrupt": KeyboardInterrupt, "a step that is no number": (ValueError, TypeError)}
    kind = kinds.get(late, MemoryError)

    def fail(*_, **__):
        raise kind("late")

    if late == "a step that is no number":
        saved["state"][14]["step"] = "many"
    elif late == "no memory for a copy":
        monkeypatch.setattr(load_state, "make_own", fail)
    else:
        optimizer.register_load_state_dict_post_hook(fail)
    with refused(kind, optimizer=optimizer):
        optimizer.load_state_dict(saved)
    for each, its in ((model, optimizer), (twin, other)):
        random_grads(each.parameters(), torch.Generator().manual_seed(seed + 1))
        its.step()
    assert state_bits(model, optimizer) == state_bits(twin, other)


@pytest.mark.parametrize("key", ["max_exp_avg_sq", "master_param"])
def test_a_state_dict_of_other_maxima_or_masters(key):
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = FusedGradDropAdamW([weight], amsgrad=True, master_weights=True, mask=None)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for wrong in (torch.ones(4), [1.0, 1.0, 1.0]):
        saved["state"][0][key] = wrong
        with refused(ValueError, key, optimizer=optimizer):
            optimizer.load_state_dict(saved)


def test_a_file_does_not_set_the_clipping():
    """It describes how this run is stepped, as the constructor says."""
    saved = FusedGradDropAdamW(named_params("a"), max_grad_norm=5.0, norm_after_mask=True).state_dict()
    optimizer = FusedGradDropAdamW(named_params("a"), max_grad_norm=2.0)
    optimizer.load_state_dict(saved)
    assert (optimizer.max_grad_norm, optimizer.norm_after_mask) == (2.0, False)


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
