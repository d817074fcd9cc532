"""State dicts exchanged with torch.optim.AdamW and with torch.distributed.checkpoint."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import ulps_apart
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from toy import (
    AFTER,
    BEFORE,
    ROUNDED_ONCE,
    Encoder,
    assert_train_alike,
    bits,
    build,
    every_policy,
    random_grads,
    snapshot,
    state_bits,
    through_a_file,
    train,
)

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, param_groups
from graddrop_kernels.optimizer import GROUP_DEFAULTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage", "ignore:.*_get_pg_default_device"
)

# Exchange with torch.

ARGUMENTS = {"lr": 0.03, "betas": (0.75, 0.96875), "eps": 1e-4, "weight_decay": 0.2}


def step_alike(theirs_model, theirs, ours_model, ours, seed):
    """One step of both from the same parameters and gradients; parameters far from 0, where an ulp means something."""
    with torch.no_grad():
        for a, b in zip(theirs_model.parameters(), ours_model.parameters(), strict=True):
            a.copy_(b.abs() + 1)
            b.copy_(a)
    for model, optimizer in ((theirs_model, theirs), (ours_model, ours)):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        optimizer.step()
    for a, b in zip(theirs_model.parameters(), ours_model.parameters(), strict=True):
        assert ulps_apart(a.detach(), b.detach()).max() <= 2
        assert theirs.state[a]["step"].item() == ours.state[b]["step"].item() > 1


@pytest.mark.parametrize(
    "keywords",
    [{"fused": True}, {"foreach": False}, {"fused": True, "amsgrad": True}, {"foreach": True, "maximize": True}],
    ids=repr,
)
@pytest.mark.parametrize("named", [False, True])
def test_from_torch_and_back(keywords, named, seed):
    params = lambda model: model.named_parameters() if named else model.parameters()
    theirs_model, ours_model = Encoder(), Encoder()
    theirs = torch.optim.AdamW(params(theirs_model), **ARGUMENTS, **keywords)
    ours = FusedGradDropAdamW(params(ours_model), mask=None, backend=ROUNDED_ONCE)  # hyper-parameters: the file's
    train(theirs, theirs_model.parameters(), range(1, 3), seed)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert (
        ours.param_groups[0]["lr"] == 0.03
        and set(GROUP_DEFAULTS) <= set(ours.param_groups[0])
        and ours.param_groups[0]["mask"] is None
    )
    assert ours.param_groups[0].get("param_names") == (
        [name for name, _ in ours_model.named_parameters()] if named else None
    )
    for a, b in zip(theirs_model.parameters(), ours_model.parameters(), strict=True):
        assert {key: bits(value) for key, value in theirs.state[a].items()} == {
            key: bits(value) for key, value in ours.state[b].items()
        }
    step_alike(theirs_model, theirs, ours_model, ours, seed)

    theirs = torch.optim.AdamW(params(theirs_model))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    step_alike(theirs_model, theirs, ours_model, ours, seed)
    random_grads(theirs_model.parameters(), torch.Generator().manual_seed(seed))


def test_a_file_does_not_switch_on_what_is_not_supported(seed):
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedGradDropAdamW([weight], mask=None)
    optimizer.load_state_dict(torch.optim.AdamW([other], capturable=True).state_dict())
    assert optimizer.param_groups[0]["capturable"] is False
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight != 1).all()


def test_a_file_of_torch_under_a_mask(seed):
    """The element masks go on at the parameter's own step."""
    theirs_model, ours_model = Encoder(), Encoder()
    theirs = torch.optim.AdamW(theirs_model.named_parameters(), **ARGUMENTS)
    train(theirs, theirs_model.parameters(), range(1, 4), seed)
    ours = FusedGradDropAdamW(ours_model.named_parameters(), mask=GradDrop(p=0.5), seed=7)
    third = ours.mask("head.weight", step=3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.mask("head.weight"), third)
    assert ours.param_groups[0]["mask"] == GradDrop(p=0.5).to_json() and ours.param_groups[0]["seed"] == 7


@pytest.mark.parametrize("bias_correction", ["active", "global"])
@pytest.mark.parametrize("mask, masked", [
    (GradDropEpoch(4), None), (GradDropEpoch(4, toggle=True), None), (GradDrop(p=0.5), "frozen"),
    (LayerGradDrop(p=0.5), "frozen"), (GradFreeze(4), None),
])  # fmt: skip
def test_a_plain_run_that_goes_on_frozen_in_part(mask, masked, bias_correction, seed):
    """Its steps count as steps in which everything was active: bias corrections go on, and do not begin anew."""
    theirs_model, ours_model = Encoder(), Encoder()
    theirs = torch.optim.AdamW(param_groups(theirs_model, weight_decay=0.2), **{**ARGUMENTS, "lr": 0.003})
    train(theirs, theirs_model.parameters(), range(1, 8), seed, set_epoch=False)
    groups = param_groups(ours_model, weight_decay=0.2)
    ours = FusedGradDropAdamW(groups, mask=mask, masked=masked, bias_correction=bias_correction)
    ours_model.load_state_dict(theirs_model.state_dict())
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    ours.set_epoch(1)
    masks = {name: ours.mask(param) for name, param in ours_model.named_parameters()}
    for model in (theirs_model, ours_model):
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    if isinstance(mask, GradDrop):
        for param in theirs_model.layer.parameters():
            param.grad *= 2  # 1 / (1 - p)
    theirs.step()
    ours.step()
    for (name, a), b in zip(theirs_model.named_parameters(), ours_model.parameters()):
        torch.testing.assert_close(a[masks[name]], b[masks[name]])
    assert not all(keep.all() for keep in masks.values())
    assert {group["completed_steps"] for group in ours.param_groups} == {8}


def test_through_torch_and_home_again(seed):
    """Our keys survive in a torch.optim.AdamW, which carries what it does not know."""
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    theirs = torch.optim.AdamW(param_groups(Encoder()))
    theirs.load_state_dict(optimizer.state_dict())
    twin, again = build("layer")
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(theirs.state_dict()))
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


def test_a_hook_may_adapt_the_file_before_it_is_checked(seed):
    """As torch documents it: a pre-hook puts changed names right, and what it returns is what is loaded."""
    weight, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    saved = FusedGradDropAdamW([("old", other)])
    random_grads([other], torch.Generator().manual_seed(seed))
    saved.step()
    optimizer = FusedGradDropAdamW([("new", weight)])

    def rename(_, state_dict):
        groups = [{**group, "param_names": ["new"]} for group in state_dict["param_groups"]]
        state = {
            index: {**values, "step": torch.tensor(41.0), "exp_avg": values["exp_avg"] * 2}
            for index, values in state_dict["state"].items()
        }
        return {"state": state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[weight]["step"].item() == 41
    assert bits(optimizer.state[weight]["exp_avg"]) == bits(saved.state[other]["exp_avg"] * 2)
    optimizer.load_state_dict(saved.state_dict())  # the hooks are still there, and only these
    assert optimizer.state[weight]["step"].item() == 41 and len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# torch.distributed.checkpoint.

flattened = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])


@every_policy
@flattened
def test_distributed_checkpoint_in_one_process(policy, flatten, seed):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    twin, again = build(policy)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, again, saved, options=options)
    assert snapshot(again)[0] == snapshot(optimizer)[0]
    assert state_bits(model, optimizer) == state_bits(twin, again)
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


@every_policy
@flattened
def test_asking_a_fresh_optimizer_for_its_state_counts_as_no_step(policy, flatten, seed):
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients to see the state."""
    model, optimizer = build(policy)
    optimizer.set_epoch(0)
    params = [bits(param) for param in model.parameters()]
    groups = snapshot(optimizer)[0]
    state_dict = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flatten)
    )
    assert snapshot(optimizer)[0] == groups
    assert [bits(param) for param in model.parameters()] == params
    assert all((value == 0).all() for param in model.parameters() for value in optimizer.state[param].values())
    assert len(optimizer.state) == len(params)  # the state is there, to be loaded into
    assert any("exp_avg_sq" in str(key) for key in (state_dict if flatten else state_dict["state"]["head.weight"]))
    twin, untouched = build(policy)
    assert_train_alike((model, optimizer), (twin, untouched), BEFORE, seed)
    assert snapshot(optimizer)[0] == snapshot(untouched)[0]


def test_asking_with_a_tensor_as_lr():
    model, optimizer = build("graddrop", lr=torch.tensor(0.02))
    get_optimizer_state_dict(model, optimizer)
    assert all(optimizer.state[param]["step"].item() == 0 for param in model.parameters())
    assert [group["completed_steps"] for group in optimizer.param_groups] == [0] * 4


def test_a_step_of_lr_0_with_gradients_is_a_step(seed):
    """A warm-up from 0 is no question for the state."""
    model, optimizer = build("graddrop", lr=0.0)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 1 for param in model.parameters())
    assert (optimizer.state[model.head.weight]["exp_avg"] != 0).all()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model.head.bias.grad = None  # another step than the last, to be looked at anew
    moment = optimizer.state[model.head.weight]["exp_avg"].clone()
    optimizer.step()  # nor is it one when there is state to see already
    assert all(optimizer.state[param]["step"].item() == 2 - (param is model.head.bias) for param in model.parameters())
    assert torch.allclose(optimizer.state[model.head.weight]["exp_avg"], 0.8 * moment)
    model, optimizer = build("graddrop")
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 1 for param in model.parameters())


@pytest.mark.parametrize("policy", ["layer", "epoch", "graddrop-callable", "fixed"])
@flattened
def test_distributed_checkpoint_on_disk(policy, flatten, tmp_path, seed):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), BEFORE, seed)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path, no_dist=True
    )
    twin, again = build(policy)
    twin.load_state_dict(model.state_dict())
    state = {"optimizer": get_optimizer_state_dict(twin, again, options=options)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, again, state["optimizer"], options=options)
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)
    assert snapshot(optimizer)[0] == snapshot(again)[0]


def test_distributed_checkpoint_refuses_another_policy(seed):
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = get_optimizer_state_dict(model, optimizer)
    twin, other = build("layer")
    other = FusedGradDropAdamW(param_groups(twin), mask=LayerGradDrop(p=0.41), seed=11)
    with pytest.raises(ValueError, match=re.escape(LayerGradDrop(p=0.4).to_json()) + ".*strict=False"):
        set_optimizer_state_dict(twin, other, saved)
