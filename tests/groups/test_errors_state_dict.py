"""State dicts that do not fit: refused with what differs, and nothing has changed."""

import copy
import re

import pytest
import torch
from torch import nn
from toy import Encoder, named_params, random_grads, refused

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradDropEpoch, LinearAnneal, param_groups
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
