"""State dicts: resuming bit for bit in another process, what a file cannot hold, names, dtypes."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import (
    AFTER,
    BEFORE,
    POLICIES,
    Encoder,
    assert_train_alike,
    bits,
    build,
    every_policy,
    half,
    random_grads,
    snapshot,
    state_bits,
    through_a_file,
    train,
)

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, param_groups
from graddrop_kernels.optimizer import GROUP_DEFAULTS


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
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
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
    "masked, bias_correction",
    [("frozen", "active"), ("frozen", "global"), ("gradient", "active"), ("update", "active")],
)
def test_resuming_under_every_meaning(policy, masked, bias_correction, seed):
    arguments = {
        "cautious_weight_decay": True,
        "masked": None if policy in ("plain", "gaussian", "rows", "skip-update") else masked,
        "bias_correction": bias_correction,
        "amsgrad": True,
    }
    model, optimizer = build(policy, **arguments)
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build(policy, **arguments)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


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
    assert_train_alike((model, optimizer), (twin, untouched), BEFORE, seed)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "master weights", "float32 moments"])
def test_a_snapshot_can_be_restored_any_number_of_times(kind, seed):
    """Training after a load does not change the file, not even where torch would share its tensors."""
    more = {
        "master weights": {"master_weights": True}, "float32 moments": {"moment_dtype": torch.float32}
    }.get(kind, {})  # fmt: skip
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model, optimizer = build("layer", Encoder(dtype=dtype), amsgrad=True, lr=torch.tensor(0.02), **more)
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = optimizer.state_dict()  # shares its tensors with the optimizer, until that has loaded it
    snap = {**saved, "state": {number: dict(state) for number, state in saved["state"].items()}}
    snap["state"]["of no parameter"] = [torch.ones(2)]
    snap["state"][0]["unknown"] = (torch.ones(2),)
    at_first, as_it_was = (*snapshot(optimizer)[::2], state_bits(model, optimizer)), copy.deepcopy(snap)
    weights = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.load_state_dict(weights)
        optimizer.load_state_dict(snap)
        first = optimizer.param_groups[0]["params"][0]
        assert optimizer.state[first].pop("unknown")[0] is not snap["state"][0]["unknown"][0]
        optimizer.state.pop("of no parameter")[0].add_(1)
        assert (*snapshot(optimizer)[::2], state_bits(model, optimizer)) == at_first
        train(optimizer, model.parameters(), AFTER, seed)
        for group in optimizer.param_groups:
            group["lr"].mul_(0.5)
        assert str(snap) == str(as_it_was)  # to four digits of all
        for number, state in as_it_was["state"].items():
            for key, value in state.items() if number != "of no parameter" else ():
                assert key == "unknown" or bits(value) == bits(snap["state"][number][key]), (number, key)


# What a file cannot hold.


def test_a_callable_p_must_be_given_again(seed):
    model, optimizer = build("graddrop-callable")
    train(optimizer, model.parameters(), BEFORE, seed)
    saved = through_a_file(optimizer.state_dict())
    assert "toy.half" in saved["param_groups"][0]["mask"]
    _, other = build("graddrop")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"toy\.half.*construct it with the same one"):
        other.load_state_dict(saved)
    assert snapshot(other) == before
    with pytest.raises(
        ValueError,
        match=r"the callable p 'toy\.half' is not stored in a state dict; construct .* with the same mask=",
    ):
        FusedGradDropAdamW(model.named_parameters(), mask=saved["param_groups"][0]["mask"])
    twin, same = build("graddrop-callable")
    twin.load_state_dict(model.state_dict())
    same.load_state_dict(saved)
    assert_train_alike((model, optimizer), (twin, same), AFTER, seed)
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
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


def groups_of(model, count):
    """Returns ``count`` groups of named parameters, each of another learning rate."""
    named = list(model.named_parameters())
    return [{"params": named[number::count], "lr": 0.01 * (number + 1)} for number in range(count)]


def test_groups_in_another_order_are_put_right_by_name(seed):
    """With their options: learning rates by layer, listed from the top and from the bottom."""
    model, twin = Encoder(), Encoder()
    optimizer = FusedGradDropAdamW(groups_of(model, 3), mask=GradDrop(p=0.4))
    train(optimizer, model.parameters(), BEFORE, seed)
    groups = [{**group, "lr": 1.0, "params": group["params"][::-1]} for group in reversed(groups_of(twin, 3))]
    again = FusedGradDropAdamW(groups, mask=GradDrop(p=0.4))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["lr"] for group in again.param_groups] == [0.01 * number for number in (3, 2, 1)]
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


def test_not_strict_regroups_by_name(seed):
    """Plain AdamW with two groups goes on with the four of the paper's scope, and back in one."""
    model, twin = Encoder(), Encoder()
    named = list(model.named_parameters())
    decays = lambda name: "bias" not in name and "norm" not in name
    groups = [{"params": [pair for pair in named if decays(pair[0]) == wanted]} for wanted in (True, False)]
    groups[0] |= {"lr": 0.3, "weight_decay": 0.7, "initial_lr": 0.5}
    groups[1] |= {"lr": 0.2, "weight_decay": 0.0, "initial_lr": 0.4}
    plain = torch.optim.AdamW(groups, betas=(0.7, 0.9))
    train(plain, model.parameters(), BEFORE, seed, set_epoch=False)
    saved = through_a_file(plain.state_dict())
    optimizer = FusedGradDropAdamW(param_groups(twin), mask=GradDrop(p=0.4), seed=7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="has 2 parameter groups, this optimizer has 4.*strict=False regroups"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    optimizer.load_state_dict(saved, strict=False)
    for (name, param), (_, its) in zip(model.named_parameters(), twin.named_parameters()):
        assert all(bits(value) == bits(optimizer.state[its][key]) for key, value in plain.state[param].items()), name
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.2, 0.3, 0.2]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.4, 0.5, 0.4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0, 0.7, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.9)}
    assert [group["mask"] is None for group in optimizer.param_groups] == [False, False, True, True]
    assert all(group["blocks"] == ["layer.0", "layer.1", "layer.2"] for group in optimizer.param_groups[:2])
    train(optimizer, twin.parameters(), AFTER, seed)

    whole = FusedGradDropAdamW(model.named_parameters(), lr=0.9, betas=(0.1, 0.2), mask=None, strict=False)
    whole.load_state_dict(through_a_file(optimizer.state_dict()))
    [group] = whole.param_groups  # what the four say alike, and its own where they do not
    assert (group["lr"], group["betas"], group["epoch"]) == (0.9, (0.7, 0.9), 3)
    for param, its in zip(model.parameters(), twin.parameters()):
        assert bits(whole.state[param]["exp_avg"]) == bits(optimizer.state[its]["exp_avg"])
    whole.step()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("theirs, ours", [(True, False), (False, True), (False, False), (True, True)])
def test_with_names_and_without(theirs, ours, masked, seed):
    """Names are the file's or ours, as in torch. Masks are drawn by name, and stay those of the saved run."""
    params = lambda model, named: model.named_parameters() if named else model.parameters()
    options = {"mask": GradDrop(p=0.4) if masked else None, "lr": 0.02}
    model, twin = Encoder(), Encoder()
    optimizer = FusedGradDropAdamW(params(model, theirs), **options)
    again = FusedGradDropAdamW(params(twin, ours), **options)
    again.load_state_dict(optimizer.state_dict())  # no step was made: nothing is to be continued
    assert ("param_names" in again.param_groups[0]) == (theirs or ours)
    again = FusedGradDropAdamW(params(twin, ours), **options)
    train(optimizer, model.parameters(), BEFORE, seed)
    twin.load_state_dict(model.state_dict())
    if masked and ours and not theirs:
        before = snapshot(again)
        with pytest.raises(ValueError, match=r"group 0 .* has no names.*model\.parameters\(\).*strict=False"):
            again.load_state_dict(optimizer.state_dict())
        assert snapshot(again) == before
        again.load_state_dict(optimizer.state_dict(), strict=False)
    else:
        again.load_state_dict(optimizer.state_dict())
        assert_train_alike((model, optimizer), (twin, again), AFTER, seed)
        [group], [its] = (each.state_dict()["param_groups"] for each in (optimizer, again))
        assert {**group, "param_names": None} == {**its, "param_names": None}
    names = [name for name, _ in model.named_parameters()] if theirs or ours else None
    assert again.state_dict()["param_groups"][0].get("param_names") == names


@pytest.mark.parametrize("option", ["stochastic_rounding", "stochastic_moments"])
def test_rounding_noise_is_drawn_by_name_too(option):
    params = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    options = {"mask": None, option: True}
    optimizer = FusedGradDropAdamW(params, **options)
    random_grads(params, torch.Generator().manual_seed(1))
    optimizer.step()
    with pytest.raises(ValueError, match="rounding noise"):
        FusedGradDropAdamW([("weight", params[0])], **options).load_state_dict(optimizer.state_dict())


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
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)
    assert again.param_groups[0]["param_names"][-1] == "embeddings.weight"


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
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_in_the_parameters_dtype_stay_there(dtype, seed):
    model, optimizer = build("graddrop", Encoder(dtype=dtype))
    train(optimizer, model.parameters(), BEFORE, seed)
    twin, again = build("graddrop", Encoder(dtype=dtype))
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.state[twin.head.weight]["exp_avg"].dtype is dtype
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)


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
    assert_train_alike((model, optimizer), (twin, again), AFTER, seed)
