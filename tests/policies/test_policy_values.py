"""Policies as values: equality, the JSON form, callables of their own, fixed masks."""

import dataclasses
import itertools
import json

import pytest
import torch

from graddrop_kernels import (
    CycleBlocks,
    ExponentialAnneal,
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    RandomMask,
    SampleBlocks,
)
from graddrop_kernels.policies import from_json

# Values and JSON.

POLICY_VALUES = [
    GradDrop(),
    GradDrop(p=0),
    GradDrop(p=0.37, every="epoch"),
    GradDrop(p=LinearAnneal(epochs=7, start=0.8, end="zero")),
    GradDrop(p=ExponentialAnneal(0.5, 0.25), every="epoch"),
    GaussianGradDrop(),
    GaussianGradDrop(p=LinearAnneal(epochs=3)),
    LayerGradDrop(),
    LayerGradDrop(p=LinearAnneal(epochs=4), every="epoch", layers=["encoder.layer.*", "decoder.layer.*"]),
    GradDropEpoch(epochs=9),
    GradDropEpoch(epochs=9, toggle=True, storage="bitpacked"),
    GradFreeze(epochs=6),
    GradFreeze(epochs=6, direction="bottom_up", blocks_per_epoch=2, layers="layer.*"),
    RandomMask(0.25),
    SampleBlocks(k=2, every=3, layers="layer.*"),
    CycleBlocks(every=4, order="random"),
]


@pytest.mark.parametrize("policy", POLICY_VALUES, ids=repr)
def test_json_round_trip(policy):
    text = policy.to_json()
    again = from_json(text)
    assert again == policy and type(again) is type(policy) and hash(again) == hash(policy)
    assert again.to_json() == text
    assert (
        json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text
    )  # canonical: sorted keys, no spaces
    assert json.loads(text)["policy"] == type(policy).__name__
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.p = 0.5


def test_policies_are_equal_when_their_strings_are():
    for one, other in itertools.combinations(POLICY_VALUES, 2):
        assert one != other and one.to_json() != other.to_json()
    alike = [
        (GradDrop(p=0), GradDrop(p=0.0)),
        (LayerGradDrop(layers=["a.*"]), LayerGradDrop(layers="a.*")),
        (GradDrop(p=LinearAnneal(3, start=0)), GradDrop(p=LinearAnneal(3, start=0.0))),
        (GradDrop(p=ExponentialAnneal(0.5, 1)), GradDrop(p=ExponentialAnneal(0.5, 1.0))),
    ]
    for one, other in alike:
        assert one == other
        assert one.to_json() == other.to_json()


def falling(epoch):
    return 0.5 / (epoch + 1)


class Falling:
    def __call__(self, epoch):
        return 0.5 / (epoch + 1)


class SlowAnneal(LinearAnneal):
    def __call__(self, epoch):
        return super().__call__(epoch // 2)


CALLABLES = {
    "function": falling,
    "lambda": lambda epoch: 0.5 / (epoch + 1),
    "object": Falling(),
    "subclass": SlowAnneal(epochs=5),
}


@pytest.mark.parametrize("p", CALLABLES.values(), ids=CALLABLES)
def test_any_callable_is_named_in_the_string_and_not_rebuilt_from_it(p):
    for policy in (GradDrop(p=p), LayerGradDrop(p=p), GaussianGradDrop(p=p)):
        assert policy.follows_epochs
        schedule = json.loads(policy.to_json())["p"]
        assert schedule["schedule"] == "callable" and schedule["name"]
        with pytest.raises(
            ValueError,
            match="is not stored in a state dict; construct the optimizer with the same mask= before loading",
        ):
            from_json(policy.to_json())


def test_fixed_masks_are_compared_by_their_bits():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    policy = FixedMask({"weight": mask})
    assert policy == FixedMask({"weight": mask.clone()}) and hash(policy) == hash(FixedMask({"weight": mask.clone()}))
    others = [
        FixedMask({"weight": ~mask}),
        FixedMask({"bias": mask}),
        FixedMask({"weight": mask}, scale=2.0),
        FixedMask({"weight": mask.T}),
    ]
    others.append(FixedMask({"weight": mask.view(6)}))
    assert all(policy != other and policy.to_json() != other.to_json() for other in others)
    two = {"a": mask, "b": ~mask}
    assert FixedMask(two) == FixedMask(dict(reversed(two.items())))  # the order of the mapping does not matter
    with pytest.raises(ValueError, match="a FixedMask is not stored in a state dict"):
        from_json(policy.to_json())


def test_a_fixed_mask_does_not_follow_changes_of_the_callers_tensor():
    mask = torch.ones(8, dtype=torch.bool)
    optimizer = FusedGradDropAdamW([("weight", torch.nn.Parameter(torch.zeros(8)))], mask=FixedMask({"weight": mask}))
    mask[:] = False
    assert optimizer.mask("weight").all()


@pytest.mark.parametrize(
    "policy, follows",
    [
        (GradDrop(), False),
        (GradDrop(every="epoch"), True),
        (GradDrop(p=LinearAnneal(3)), True),
        (GaussianGradDrop(), False),
        pytest.param(GaussianGradDrop(p=falling), True, id="GaussianGradDrop(p=falling)-True"),  # no address in it
        (LayerGradDrop(), False),
        (LayerGradDrop(every="epoch"), True),
        (GradDropEpoch(3), True),
        (GradFreeze(3), True),
        (FixedMask({"layer.1.linear.weight": torch.ones(6, 6).bool()}), False),
    ],
    ids=repr,
)
def test_which_policies_follow_epochs(policy, follows):
    assert policy.follows_epochs is follows
