"""bfloat16 moments of float32 parameters that the user makes, as torch's newest fused step takes them: in a hook before
the first step, in place of float32 ones later, or by a file.
"""

import copy

import pytest
import torch
from cases import BF16, F32, assert_same_bits
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from toy import bits, random_grads, snapshot, through_a_file

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASKS = {
    "none": lambda: None,
    "graddrop": lambda: GradDrop(0.3),
    "frozen": lambda: GradDropEpoch(3),
    "blocks": lambda: GradFreeze(2, layers=["layers.*"]),
}
every_mask = pytest.mark.parametrize("mask", MASKS)
amsgrad = pytest.mark.parametrize("amsgrad", [False, True])


def make_missing_state(optimizer, args=(), kwargs=None):
    """A pre-hook of step(): bfloat16 state for each parameter that has a gradient and no state."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and not optimizer.state[param]:
                optimizer.state[param]["step"] = torch.zeros((), device=param.device)
                for name in MOMENTS[: 2 + group["amsgrad"]]:
                    optimizer.state[param][name] = torch.zeros_like(param, dtype=BF16)


def make(seed, backend="auto", mask="graddrop", hook=False, kind=lambda value: value, **more):
    """(named tensors, each of ``kind``, and the optimizer)."""
    generator = torch.Generator().manual_seed(seed)
    named = [(f"layers.{i}.weight", kind(torch.rand(20, 7, generator=generator))) for i in range(4)]
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "fused": True, **more}
    optimizer = FusedGradDropAdamW(named, mask=MASKS[mask](), seed=seed, backend=backend, **arguments)
    if hook:
        optimizer.register_step_pre_hook(make_missing_state)
    optimizer.set_epoch(0)
    return named, optimizer


def step(made, seed):
    named, optimizer = made
    random_grads([param for _, param in named], torch.Generator().manual_seed(seed))
    optimizer.step()


def moments_to(made, *dtypes):
    """Replaces the moments by copies, cast to each dtype in turn."""
    for state in made[1].state.values():
        for name in set(MOMENTS) & state.keys():
            for dtype in dtypes:
                state[name] = state[name].to(dtype)


def assert_bfloat16_state(made, others=F32):
    named, optimizer = made
    for _, param in named:
        state = optimizer.state[param]
        assert param.dtype is param.grad.dtype is state["step"].dtype is F32
        assert {state[name].dtype for name in MOMENTS if name in state} == {BF16}
        assert len(state) == 3 + optimizer.param_groups[0]["amsgrad"]


def assert_alike(made, other):
    for (name, a), (_, b) in zip(made[0], other[0], strict=True):
        assert_same_bits(a, b, name)
        mine, theirs = made[1].state[a], other[1].state[b]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_same_bits(value, theirs[key].to(value.dtype), f"{key} of {name}")


@amsgrad
@every_mask
def test_state_that_a_hook_makes(mask, amsgrad, backend, seed):
    """It stays bfloat16; the results are those of moment_dtype, and of float32 state that is rounded after each step.
    """
    made = make(seed, backend, mask, hook=True, amsgrad=amsgrad)
    wanted = make(seed, backend, mask, amsgrad=amsgrad, moment_dtype=BF16)
    rounded = make(seed, backend, mask, amsgrad=amsgrad)
    unrounded = make(seed, backend, mask, amsgrad=amsgrad)
    for i in range(7):
        for each in (made, wanted, rounded, unrounded):
            each[1].set_epoch(i // 4)
            step(each, seed + i)
        moments_to(rounded, BF16, F32)
        if mask != "blocks" or i >= 4:  # before that one block has state of no step
            assert_bfloat16_state(made)
        assert_alike(made, wanted)
        assert_alike(made, rounded)
    assert any(bits(a) != bits(b) for (_, a), (_, b) in zip(made[0], unrounded[0]))


@amsgrad
def test_a_hook_that_leaves_existing_state(amsgrad, backend, seed):
    """Two groups in one step, with float32 moments and with bfloat16 ones."""
    mixed, whole = (make(seed, backend, amsgrad=amsgrad) for _ in range(2))
    half = [param for _, param in mixed[0][:2]]
    random_grads(half, torch.Generator().manual_seed(seed))
    mixed[1].param_groups[0]["params"] = half
    mixed[1].param_groups[0]["param_names"] = [name for name, _ in mixed[0][:2]]
    mixed[1].add_param_group({"params": mixed[0][2:], **{key: mixed[1].param_groups[0][key] for key in ("lr", "eps")}})
    for param in half:
        mixed[1].state[param] = {name: torch.zeros_like(param) for name in MOMENTS[: 2 + amsgrad]}
        mixed[1].state[param]["step"] = torch.zeros(())
    mixed[1].register_step_pre_hook(make_missing_state)
    bfloat16 = make(seed, backend, hook=True, amsgrad=amsgrad)
    for i in range(3):
        for each in (mixed, whole, bfloat16):
            step(each, seed + i)
    for index, (name, param) in enumerate(mixed[0]):
        twin = (whole if index < 2 else bfloat16)
        assert_same_bits(param, twin[0][index][1], name)
        assert mixed[1].state[param]["exp_avg"].dtype is (F32 if index < 2 else BF16)


@every_mask
def test_moments_that_are_replaced_after_some_steps(mask, backend, seed):
    made, rounded = (make(seed, backend, mask) for _ in range(2))
    for each in (made, rounded):
        each[1].set_epoch(1)
    for i in range(5):
        if i == 2:
            moments_to(made, BF16)
        if i >= 2:
            moments_to(rounded, BF16, F32)
        for each in (made, rounded):
            step(each, seed + i)
    moments_to(rounded, BF16, F32)
    assert_bfloat16_state(made)
    assert_alike(made, rounded)


def test_moments_of_two_dtypes_are_refused_by_name(backend, seed):
    made = make(seed, backend)
    step(made, seed)
    param = made[0][1][1]
    made[1].state[param]["exp_avg"] = made[1].state[param]["exp_avg"].to(BF16)
    before = snapshot(made[1])
    with pytest.raises(ValueError, match=r"layers\.1\.weight.*exp_avg torch.bfloat16, exp_avg_sq torch.float32.*conv"):
        made[1].step()
    assert snapshot(made[1]) == before


@amsgrad
def test_gradients_are_unscaled_beside_it(amsgrad, backend, seed):
    made, plain = (make(seed, backend, hook=True, amsgrad=amsgrad) for _ in range(2))
    for i in range(3):
        for each, scale in ((made, 128.0), (plain, 1.0)):
            random_grads([param for _, param in each[0]], torch.Generator().manual_seed(seed + i))
            for _, param in each[0]:
                param.grad *= scale
        made[1].grad_scale, made[1].found_inf = torch.tensor(128.0), torch.tensor(0.0)
        for _, optimizer in (made, plain):
            optimizer.step()
    assert_alike(made, plain)
    assert_bfloat16_state(made)
    for (name, a), (_, b) in zip(made[0], plain[0]):
        assert_same_bits(a.grad, b.grad, name)
    made[1].found_inf = torch.tensor(1.0)
    before = [bits(param) for _, param in made[0]]
    step(made, seed)
    assert [bits(param) for _, param in made[0]] == before


def model_of(made):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in made[0])
    for module, (_, value) in zip(model.layers, made[0]):
        module.weight = value
    return model


@pytest.mark.parametrize("way", ["the same optimizer", "a file", "a checkpoint"])
@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_a_file_brings_it_back(how, way, seed):
    """Also into an optimizer that knows nothing of it: the training goes on bit for bit."""
    made, other = make(seed, kind=torch.nn.Parameter, hook=how == "hook"), make(seed, kind=torch.nn.Parameter)
    step(made, seed)
    if how == "replaced":
        moments_to(made, BF16)
    step(made, seed + 1)
    if way == "a checkpoint":
        saved = get_optimizer_state_dict(model_of(made), made[1])
    else:
        saved = through_a_file(made[1].state_dict())
    weights = [value.detach().clone() for _, value in made[0]]
    saved = copy.deepcopy(saved)
    step(made, seed + 2)
    expected = copy.deepcopy(made)
    if way == "the same optimizer":
        other = made
    with torch.no_grad():
        for (_, value), saved_value in zip(other[0], weights):
            value.copy_(saved_value)
    if way == "a checkpoint":
        set_optimizer_state_dict(model_of(other), other[1], saved)
    else:
        other[1].load_state_dict(saved)
    step(other, seed + 2)
    assert_bfloat16_state(other)
    assert_alike(other, expected)


def test_asking_for_state_that_a_hook_makes_is_no_step(seed):
    """torch.distributed.checkpoint steps a fresh optimizer with lr 0 and gradients of zeros."""
    asked, never = (make(seed, kind=torch.nn.Parameter, hook=True) for _ in range(2))
    state = get_optimizer_state_dict(model_of(asked), asked[1])["state"]
    assert {float(each["step"]) for each in state.values()} == {0.0} and len(state) == 4
    assert {each["exp_avg"].dtype for each in state.values()} == {BF16}
    for i in range(2):
        for made in (asked, never):
            step(made, seed + i)
    assert_bfloat16_state(asked)
    assert_alike(asked, never)
    assert [group["completed_steps"] for group in asked[1].param_groups] == [2]


def test_a_first_step_of_zeros_is_one_where_steps_were_made(seed):
    """State that was taken over by hand, of an optimizer whose groups have counted nothing."""
    made = make(seed, lr=0.0, hook=True)
    for _, param in made[0]:
        param.grad = torch.zeros_like(param)
    make_missing_state(made[1])
    for _, param in made[0]:
        made[1].state[param]["step"] += 5
    made[1].step()
    assert {float(made[1].state[param]["step"]) for _, param in made[0]} == {6.0}
