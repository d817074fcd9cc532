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
