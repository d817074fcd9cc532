"""Steps in the backward pass: those of a normal loop, with no gradient left; and what cannot work so is refused."""

import copy
import re
import weakref

import pytest
import torch
from toy import Encoder, bits, refused

from graddrop_kernels import (
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    param_groups,
)

POLICIES = {
    "plain": None,
    "graddrop": GradDrop(0.3),
    "gaussian": GaussianGradDrop(0.3),
    "layer": LayerGradDrop(0.5),
    "frozen layer": LayerGradDrop(0.5),
    "epoch": GradDropEpoch(3),
    "freeze": GradFreeze(3),
}


def make(policy, backend, seed, **more):
    torch.manual_seed(seed)
    model = Encoder()
    masked = {"masked": "frozen"} if policy == "frozen layer" else {}
    optimizer = FusedGradDropAdamW(
        param_groups(model, weight_decay=0.1), lr=0.02, betas=(0.8, 0.95), eps=1e-4, mask=POLICIES[policy], seed=seed,
        backend=backend, **masked, **more,
    )  # fmt: skip
    return model, optimizer


def loss_of(model, step, seed):
    ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed + step))
    return model(ids).square().mean()


def params_and_state(model, optimizer):
    return [
        (bits(param), {key: bits(value) for key, value in optimizer.state[param].items()})
        for param in model.parameters()
    ], [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_in_the_backward_pass_is_a_normal_one(policy, backend, seed):
    normal, other = make(policy, backend, seed), make(policy, backend, seed)
    handle = other[1].step_in_backward()
    for step in range(6):
        for model, optimizer in (normal, other):
            optimizer.set_epoch(step // 2)
            optimizer.zero_grad()
            loss_of(model, step, seed).backward()
            if optimizer is other[1]:
                assert all(param.grad is None for param in model.parameters())
            optimizer.step()
        assert params_and_state(*normal) == params_and_state(*other), step
    handle.remove()
    for model, optimizer in (normal, other):  # and on in the usual way
        optimizer.zero_grad()
        loss_of(model, 6, seed).backward()
        assert any(param.grad is not None for param in model.parameters())
        optimizer.step()
    assert params_and_state(*normal) == params_and_state(*other)


def test_gradients_are_never_all_there(seed):
    """When a parameter's gradient arrives, those of all that arrived before are gone, from memory too."""
    model, optimizer = make("graddrop", "auto", seed)
    arrived, alive = [], []

    def count(param):
        arrived.append(weakref.ref(param.grad))
        alive.append(sum(grad() is not None for grad in arrived))
        alive.append(sum(other.grad is not None for other in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    handle = optimizer.step_in_backward()
    loss_of(model, 0, seed).backward()
    assert len(arrived) == len(list(model.parameters())) and set(alive) == {1}
    optimizer.step()
    handle.remove()


def test_what_has_a_gradient_still_is_stepped_at_the_end(seed):
    """A parameter that was frozen when the hooks were set gets its gradient later."""
    normal, other = make("graddrop", "auto", seed), make("graddrop", "auto", seed)
    late = [next(model.parameters()) for model, _ in (normal, other)]
    late[1].requires_grad_(False)
    handle = other[1].step_in_backward()
    late[1].requires_grad_(True)
    for step in range(2):
        for model, optimizer in (normal, other):
            optimizer.zero_grad()
            loss_of(model, step, seed).backward()
            optimizer.step()
    assert params_and_state(*normal) == params_and_state(*other)
    handle.remove()


def test_a_closure_steps_too(seed):
    normal, other = make("graddrop", "auto", seed), make("graddrop", "auto", seed)
    handle = other[1].step_in_backward()
    losses = []
    for model, optimizer in (normal, other):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0, seed)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses[0] == losses[1] and params_and_state(*normal) == params_and_state(*other)
    handle.remove()


def test_accumulation_is_refused(seed):
    model, optimizer = make("graddrop", "auto", seed)
    handle = optimizer.step_in_backward()
    loss_of(model, 0, seed).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.step\(\) after every backward\(\)"):
        loss_of(model, 1, seed).backward()
    with pytest.raises(RuntimeError, match="between backward.. and optimizer.step"):
        handle.remove()
    optimizer.step()
    handle.remove()


@pytest.mark.parametrize(
    "argument, word", [({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0 needs"), ({"fused": True}, "GradScaler")], ids=str
)
def test_what_needs_all_gradients_at_once_is_refused(argument, word, seed):
    model, optimizer = make("graddrop", "auto", seed, **argument)
    with pytest.raises(ValueError, match=word):
        optimizer.step_in_backward()
    loss_of(model, 0, seed).backward()
    assert all(param.grad is not None for param in model.parameters())  # no hook was left


def test_a_norm_that_is_asked_for_later_is_refused_before_anything_moves(seed):
    model, optimizer = make("graddrop", "auto", seed)
    optimizer.step_in_backward()
    optimizer.max_grad_norm = 0.5
    before = [bits(param) for param in model.parameters()]
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5"):
        loss_of(model, 0, seed).backward()
    assert [bits(param) for param in model.parameters()] == before and not optimizer.state


def test_several_processes_are_refused(monkeypatch, seed):
    model, optimizer = make("graddrop", "auto", seed)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="more than one process"):
        optimizer.step_in_backward()


def test_a_second_call_is_refused(seed):
    model, optimizer = make("graddrop", "auto", seed)
    handle = optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match="on already"):
        optimizer.step_in_backward()
    handle.remove()
    optimizer.step_in_backward()


def test_hooks_of_an_optimizer_that_is_gone_do_nothing(seed):
    model, optimizer = make("graddrop", "auto", seed)
    optimizer.step_in_backward()
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None, "it must not wait for the garbage collector, with its moments"
    loss_of(model, 0, seed).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_a_copy_of_the_optimizer_steps_normally(seed):
    model, optimizer = make("graddrop", "auto", seed)
    optimizer.step_in_backward()
    again = copy.deepcopy(optimizer)
    again.step_in_backward().remove()  # else refused: it is on already


def test_a_step_that_failed_leaves_no_clock_behind(seed):
    """The epoch is that of the step that is made, not of one that failed before."""
    usable = []
    weight = torch.nn.Parameter(torch.randn(500))

    def p(epoch):
        if epoch == 1 and not usable:
            raise ValueError("no p at epoch 1")
        return 0.1 + 0.2 * epoch

    optimizer = FusedGradDropAdamW([("weight", weight)], mask=GradDrop(p), seed=seed)
    optimizer.param_groups[0].update(epoch=1, epoch_was_set=True)
    optimizer.step_in_backward()
    with pytest.raises(ValueError, match="no p at epoch 1"):
        weight.square().sum().backward()
    usable.append(True)
    weight.grad = None
    optimizer.set_epoch(4)
    expected = optimizer.mask("weight")
    weight.square().sum().backward()
    assert torch.equal(optimizer.state[weight]["exp_avg"] != 0, expected)


def test_a_gradient_that_another_hook_has_taken_is_none(seed):
    """As where an earlier optimizer steps in the backward pass too."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 2)
    model.weight.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=None)
    optimizer.step_in_backward()
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight.detach(), before) and list(optimizer.state) == [model.bias]


BETWEEN = {
    "state_dict()": lambda optimizer: optimizer.state_dict(),
    "set_epoch()": lambda optimizer: optimizer.set_epoch(1),
    "a copy of the optimizer": copy.deepcopy,
    "remove()": lambda optimizer: optimizer.handle.remove(),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_would_see_half_of_a_step_is_refused(what):
    model = torch.nn.Linear(2, 2)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(0.5))
    optimizer.handle = optimizer.step_in_backward()
    model(torch.ones(1, 2)).sum().backward()
    with refused(RuntimeError, re.escape(what) + r" between backward\(\) and optimizer.step\(\)"):
        BETWEEN[what](optimizer)
    optimizer.step()
    optimizer.handle.remove()


def test_a_load_ends_a_step_that_was_broken_off(seed):
    """After an exception in the backward pass a checkpoint brings everything back."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(0.5))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step_in_backward()

    def fail(_):
        raise KeyboardInterrupt

    hidden = model[0](torch.ones(1, 2))
    hidden.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model[1](hidden).sum().backward()
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 4
    assert optimizer.param_groups[0]["completed_steps"] == 1
