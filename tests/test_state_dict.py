"""State dicts: resuming bit for bit in another process, exchange with torch, distributed checkpoints, names, dtypes."""

import copy
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import ulps_apart
from test_optimizer import (
    POLICIES,
    ROUNDED_ONCE,
    Encoder,
    bits,
    build,
    every_policy,
    half,
    random_grads,
    snapshot,
    state_bits,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, LayerGradDrop, param_groups
from graddrop_kernels.optimizer import GROUP_DEFAULTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage", "ignore:.*_get_pg_default_device"
)

BEFORE, AFTER = (
    range(6),
    range(6, 13),
)  # of four steps an epoch: the break is in the middle of epoch 1, two more epochs begin after it


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_plain(value):
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (int, float, str, bool)


# Resuming.


@every_policy
def test_groups_hold_plain_values_and_the_state_is_torchs(policy, seed):
    model, optimizer = build(policy, amsgrad=True)
    train(optimizer, model.parameters(), BEFORE, seed)
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        assert {key: value for key, value in group.items() if not is_plain(value)} == {}
        assert set(GROUP_DEFAULTS) <= set(group)
    for state in state_dict["state"].values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert state["step"].shape == () and state["step"].dtype is torch.float32


@every_policy
def test_loading_what_was_saved_changes_nothing(policy, seed):
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), BEFORE, seed)
    before = snapshot(optimizer)
    saved = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def resume(folder, seed):
    """What the new process does: everything from its own code and the files of the old one."""
    for path in sorted(Path(folder).glob("*.saved")):
        saved = torch.load(path, weights_only=True)
        model, optimizer = build(path.stem)
        random_grads(model.parameters(), torch.Generator().manual_seed(0))
        optimizer.step()  # a start that is not the saved one, to be overwritten
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(optimizer, model.parameters(), AFTER, seed)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path.with_suffix(".resumed"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(seed, folder): every policy, saved here in the middle of an epoch and trained on in one other process."""
    folder, seed = tmp_path_factory.mktemp("resumed"), int.from_bytes(os.urandom(3), "little")
    for policy in POLICIES:
        model, optimizer = build(policy)
        train(optimizer, model.parameters(), BEFORE, seed)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{policy}.saved")
    code = f"import test_state_dict; test_state_dict.resume({str(folder)!r}, {seed})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return seed, folder


@every_policy
def test_a_new_process_continues_bit_for_bit(policy, resumed):
    seed, folder = resumed
    print(f"seed {seed}")
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), [*BEFORE, *AFTER], seed)
    there = torch.load(folder / f"{policy}.resumed", weights_only=True)
    for name, param in model.state_dict().items():
        assert bits(there["model"][name]) == bits(param), name
    here = optimizer.state_dict()
    assert there["optimizer"]["param_groups"] == here["param_groups"]
    assert there["optimizer"]["state"].keys() == here["state"].keys()
    for index, state in here["state"].items():
        assert {key: bits(value) for key, value in there["optimizer"]["state"][index].items()} == {
            key: bits(value) for key, value in state.items()
        }


@every_policy
@pytest.mark.parametrize(
    "masked, bias_correction", [("frozen", "active"), ("frozen", "global"), ("gradient", "active")]
)
def test_resuming_under_every_meaning(policy, masked, bias_correction, seed):
    arguments = {
        "masked": None if policy in ("plain", "gaussian") else masked,
        "bias_correction": bias_correction,
        "amsgrad": True,
    }
    model, optimizer = build(policy, **arguments)
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build(policy, **arguments)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


def test_the_masks_go_on_after_a_resume(seed):
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build("layer")
    started = [bool(again.mask(f"layer.{i}.linear.weight").all()) for i in range(3)]
    again.load_state_dict(optimizer.state_dict())
    for step in range(20):
        for name, _ in model.named_parameters():
            assert torch.equal(again.mask(name, step=step), optimizer.mask(name, step=step))
    assert started == [bool(again.mask(f"layer.{i}.linear.weight", step=0).all()) for i in range(3)]


@pytest.mark.parametrize("policy", ["graddrop-anneal", "layer-epoch", "epoch", "freeze"])
def test_resuming_restores_the_epoch_by_itself(policy, seed):
    """In the middle of an epoch, the first too, there is no set_epoch to call."""
    for steps in (range(2), range(6)):
        model, optimizer = build(policy)
        train(optimizer, model.parameters(), steps, seed)
        twin, again = build(policy)
        again.load_state_dict(through_a_file(optimizer.state_dict()))
        assert again.active_fraction() == optimizer.active_fraction()
        random_grads(twin.parameters(), torch.Generator().manual_seed(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.step()


@every_policy
def test_loading_the_state_of_a_fresh_optimizer(policy, seed):
    """As accelerate does when it prepares one."""
    model, optimizer = build(policy)
    optimizer.load_state_dict(optimizer.state_dict())
    twin, untouched = build(policy)
    for each, those in ((model, optimizer), (twin, untouched)):
        train(those, each.parameters(), BEFORE, seed)
    assert state_bits(model, optimizer) == state_bits(twin, untouched)


# What a file cannot hold.


def test_a_callable_p_must_be_given_again(seed):
    model, optimizer = build("graddrop-callable")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(optimizer.state_dict())
    assert "test_optimizer.half" in saved["param_groups"][0]["mask"]
    _, other = build("graddrop")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"test_optimizer\.half.*construct it with the same one"):
        other.load_state_dict(saved)
    assert snapshot(other) == before
    with pytest.raises(
        ValueError,
        match=r"the callable p 'test_optimizer\.half' is not stored in a state dict; construct .* with the same mask=",
    ):
        FusedGradDropAdamW(model.named_parameters(), mask=saved["param_groups"][0]["mask"])
    twin, same = build("graddrop-callable")
    twin.load_state_dict(model.state_dict())
    same.load_state_dict(saved)
    for each, those in ((model, optimizer), (twin, same)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, same)
    assert same.active_fraction() == [1 - round(half(3) * 65536) / 65536] * 2 + [1.0, 1.0]


def test_a_fixed_mask_must_be_given_again(seed):
    model, optimizer = build("fixed")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(optimizer.state_dict())
    assert len(str(saved["param_groups"][0]["mask"])) < 200  # a digest, not the mask
    _, other = build("graddrop")
    with pytest.raises(ValueError, match="FixedMask.*construct it with the same one"):
        other.load_state_dict(saved)
    with pytest.raises(
        ValueError, match="a FixedMask is not stored in a state dict; construct the optimizer with the same mask="
    ):
        FusedGradDropAdamW(model.named_parameters(), mask=saved["param_groups"][0]["mask"])
    twin = Encoder()
    wrong = {name: ~torch.ones_like(param).bool() for name, param in twin.named_parameters() if "linear" in name}
    with pytest.raises(ValueError, match="construct it with the same one"):
        FusedGradDropAdamW(param_groups(twin), seed=11, mask=FixedMask(wrong, scale=1.25)).load_state_dict(saved)


def test_not_strict_goes_on_under_its_own_policy(seed):
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, other = build("graddrop", seed=99)
    own = other.param_groups[0]["mask"], other.param_groups[0]["seed"]
    first_mask = other.mask("layer.0.linear.weight", step=6)
    other.load_state_dict(optimizer.state_dict(), strict=False)
    assert (other.param_groups[0]["mask"], other.param_groups[0]["seed"]) == own
    assert torch.equal(other.mask("layer.0.linear.weight"), first_mask)
    assert all(
        bits(other.state[a]["exp_avg"]) == bits(optimizer.state[b]["exp_avg"])
        for a, b in zip(twin.parameters(), model.parameters())
    )
    random_grads(twin.parameters(), torch.Generator().manual_seed(seed))
    other.step()


# Names.


def test_a_changed_order_is_put_right_by_name(seed):
    """Two groups, the parameters of each in another order than when they were saved."""

    def optimizer_of(model, order):
        named = list(model.named_parameters())
        halves = [named[:7], named[7:]]
        groups = [{"params": [half[i] for i in order if i < len(half)]} for half in halves]
        return FusedGradDropAdamW(groups, lr=0.02, mask=GradDrop(p=0.4))

    model, twin = Encoder(), Encoder()
    assert len(list(model.parameters())) == 15
    optimizer, again = optimizer_of(model, range(8)), optimizer_of(twin, [3, 7, 0, 5, 1, 6, 2, 4])
    assert [group["param_names"] for group in again.param_groups] != [
        group["param_names"] for group in optimizer.param_groups
    ]
    train(optimizer, model.parameters(), BEFORE, seed)
    names = [list(group["param_names"]) for group in again.param_groups]
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["param_names"] for group in again.param_groups] == names  # names describe the live model
    assert state_bits(model, optimizer) == state_bits(twin, again)
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


def test_names_of_a_wrapped_model_are_the_bare_ones(seed):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, twin = Encoder(), Encoder()
    optimizer = FusedGradDropAdamW(Wrapper(model).named_parameters(), lr=0.02, mask=GradDrop(p=0.4))
    again = FusedGradDropAdamW(reversed(list(twin.named_parameters())), lr=0.02, mask=GradDrop(p=0.4))
    train(optimizer, model.parameters(), BEFORE, seed)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(
        through_a_file(optimizer.state_dict())
    )  # state_dict() itself shares its tensors, as torch's does
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)
    assert again.param_groups[0]["param_names"][-1] == "embeddings.weight"


def test_two_parameters_of_one_name_keep_their_own_state(seed):
    """Two models in one optimizer: list(a.named_parameters()) + list(b.named_parameters())."""
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = FusedGradDropAdamW([("weight", weight) for weight in weights], mask=None)
    random_grads(weights, torch.Generator().manual_seed(seed))
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert snapshot(optimizer) == before


def test_the_file_is_not_changed(seed):
    model, optimizer = build("graddrop")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(optimizer.state_dict())
    as_it_was = copy.deepcopy(saved)
    _, again = build("graddrop")
    again.load_state_dict(saved)
    assert saved["param_groups"] == as_it_was["param_groups"]
    assert [{key: bits(value) for key, value in state.items()} for state in saved["state"].values()] == [
        {key: bits(value) for key, value in state.items()} for state in as_it_was["state"].values()
    ]


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_float32_moments_of_half_parameters_survive(dtype, amsgrad, seed):
    """torch casts every loaded state to the parameter's dtype."""
    make = lambda: build("graddrop", Encoder(dtype=dtype), moment_dtype=torch.float32, amsgrad=amsgrad)
    model, optimizer = make()
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = make()
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    moments = {key: value.dtype for key, value in again.state[twin.head.weight].items()}
    assert set(moments.values()) == {torch.float32} and len(moments) == 3 + amsgrad
    assert state_bits(model, optimizer) == state_bits(twin, again)
    assert (
        again.state[twin.head.weight]["exp_avg"].bfloat16().float() != again.state[twin.head.weight]["exp_avg"]
    ).any()  # the test can tell
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_in_the_parameters_dtype_stay_there(dtype, seed):
    model, optimizer = build("graddrop", Encoder(dtype=dtype))
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build("graddrop", Encoder(dtype=dtype))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.state[twin.head.weight]["exp_avg"].dtype is dtype
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


@pytest.mark.parametrize(
    "theirs, ours", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float64, torch.float32)]
)
def test_a_file_of_a_model_of_another_dtype_can_be_gone_on_with(theirs, ours, seed):
    """As with torch.optim.AdamW, say from bfloat16 training to float32: never to moments that no backend takes."""
    model, optimizer = build("graddrop", Encoder(dtype=theirs))
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build("graddrop", Encoder(dtype=ours))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    train(again, twin.parameters(), AFTER, seed)
    assert all(again.state[param]["step"].item() == 13 for param in twin.parameters())


@pytest.mark.parametrize("kind", [float, int, "float64 tensor", "int64 tensor"])
def test_step_counts_of_old_files(kind, seed):
    model, optimizer = build("graddrop")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        if isinstance(kind, type):
            state["step"] = kind(state["step"].item())
        else:
            state["step"] = state["step"].to(getattr(torch, kind.split()[0]))
    twin, again = build("graddrop")
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


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


def test_through_torch_and_home_again(seed):
    """Our keys survive in a torch.optim.AdamW, which carries what it does not know."""
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    theirs = torch.optim.AdamW(param_groups(Encoder()))
    theirs.load_state_dict(optimizer.state_dict())
    twin, again = build("layer")
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(theirs.state_dict()))
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


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
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)


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
    for each, those in ((model, optimizer), (twin, untouched)):
        train(those, each.parameters(), BEFORE, seed)
    assert state_bits(model, optimizer) == state_bits(twin, untouched)
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
    for each, those in ((model, optimizer), (twin, again)):
        train(those, each.parameters(), AFTER, seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)
    assert snapshot(optimizer)[0] == snapshot(again)[0]


def test_distributed_checkpoint_refuses_another_policy(seed):
    model, optimizer = build("layer")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = get_optimizer_state_dict(model, optimizer)
    twin, other = build("layer")
    other = FusedGradDropAdamW(param_groups(twin), mask=LayerGradDrop(p=0.41), seed=11)
    with pytest.raises(ValueError, match=re.escape(LayerGradDrop(p=0.4).to_json()) + ".*strict=False"):
        set_optimizer_state_dict(twin, other, saved)
