"""The optimizer in a training: closures, hooks, learning rate schedulers, gradient scalers, copies and pickles."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy import ROUNDED_ONCE, Encoder, bits, build, every_policy, random_grads, snapshot, state_bits, train

from graddrop_kernels import FusedGradDropAdamW, GradDrop

# step(): closures and hooks.


def test_closure_is_called_once_with_gradients_enabled(seed):
    model, optimizer = build("graddrop")
    twin, reference = build("graddrop")
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(seed))
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(ids).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        reference.zero_grad()
        expected = twin(ids).square().mean()
        expected.backward()
        assert reference.step() is None
        assert torch.equal(loss, expected) and loss.requires_grad
    assert seen == [True] * 3
    assert state_bits(model, optimizer) == state_bits(twin, reference)
    with torch.no_grad():
        optimizer.step(closure)
    assert seen[-1]


def test_every_hook_runs_exactly_once_a_step(seed):
    model, optimizer = build("graddrop")
    calls = []
    handles = [
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs: calls.append(("pre", opt is optimizer, bits(model.head.weight)))
        ),
        optimizer.register_step_post_hook(
            lambda opt, args, kwargs: calls.append(("post", opt is optimizer, bits(model.head.weight)))
        ),
        register_optimizer_step_pre_hook(
            lambda opt, args, kwargs: calls.append(("global pre", opt is optimizer, None))
        ),
        register_optimizer_step_post_hook(
            lambda opt, args, kwargs: calls.append(("global post", opt is optimizer, None))
        ),
    ]
    try:
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _, _ in calls) == ["global post", "global pre", "post", "pre"]
    assert all(ours for _, ours, _ in calls)
    weights = {name: weight for name, _, weight in calls}
    assert weights["pre"] != weights["post"] == bits(model.head.weight)
    optimizer.step()
    assert len(calls) == 4


def test_zero_grad():
    model, optimizer = build("graddrop")
    random_grads(model.parameters(), torch.Generator().manual_seed(0))
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_it_can_be_printed():
    _, optimizer = build("layer")
    assert "FusedGradDropAdamW" in repr(optimizer) and "LayerGradDrop" in repr(optimizer)


# Learning rates.


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 5),  # a warm-up from 0
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=20),  # moves beta1 too
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [torch.optim.lr_scheduler.LinearLR(opt, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)],
            milestones=[3],
        ),
    ],
    ids=["lambda", "one-cycle", "restarts", "sequential"],
)
def test_torchs_schedulers_drive_it_as_they_drive_torchs(scheduler, seed):
    runs = []
    for cls, arguments in ((torch.optim.AdamW, {}), (FusedGradDropAdamW, {"mask": None, "backend": ROUNDED_ONCE})):
        model = Encoder()
        optimizer = cls(model.parameters(), lr=0.03, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be one
            schedule = scheduler(optimizer)
            values = []
            for step in range(10):
                random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
                optimizer.step()
                schedule.step()
                values.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        runs.append((values, list(model.parameters())))
    assert runs[0][0] == runs[1][0]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=0)  # ten steps of 2 ulp
    assert any((a - b).abs().max() > 0.01 for a, b in zip(runs[1][1], Encoder().parameters()))


def test_reduce_on_plateau():
    model, optimizer = build("layer")
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005] * 4


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_as_lr(shape, seed):
    results = []
    for lr in (torch.full(shape, 0.03), float(torch.tensor(0.03))):
        model, optimizer = build("graddrop", lr=lr)
        assert optimizer.param_groups[0]["lr"] is lr
        for step in range(3):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
            optimizer.step()
            if isinstance(lr, torch.Tensor):
                lr.mul_(0.5)
            else:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        results.append(state_bits(model, optimizer))
    assert results[0] == results[1]


def test_a_grad_scaler_skips_the_step_that_overflowed(seed):
    """The scaler unscales and looks for infinities; a skipped step counts nowhere."""
    model, optimizer = build("layer")
    twin, reference = build("layer")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(seed))
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(ids).square().mean()).backward()
        if step == 2:
            model.head.weight.grad[0, 0] = float("inf")
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert snapshot(optimizer)[0] == before[0] and snapshot(optimizer)[2] == before[2]
            continue
        reference.zero_grad()
        twin(ids).square().mean().backward()
        reference.step()
    assert state_bits(model, optimizer) == state_bits(twin, reference)  # a power of two unscales exactly


# Copies.


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@every_policy
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_continue_bit_for_bit(policy, copied, seed):
    model, optimizer = build(policy, backend="exact" if policy == "layer" else "auto")
    train(optimizer, model.parameters(), range(6), seed)
    twin, again = copied((model, optimizer))
    assert (
        type(again) is FusedGradDropAdamW
        and again.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    )
    untouched = state_bits(twin, again)
    train(optimizer, model.parameters(), range(6, 11), seed)
    assert state_bits(twin, again) == untouched  # nothing is shared
    train(again, twin.parameters(), range(6, 11), seed)
    assert state_bits(twin, again) == state_bits(model, optimizer)
    assert again._backend == optimizer._backend
    again.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))], "mask": GradDrop(p=0.1)})
    assert again.param_groups[-1]["seed"] == 11  # the defaults came along


@every_policy
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_remembers_that_set_epoch_was_called(policy, copied, seed):
    model, optimizer = build(policy)
    optimizer.set_epoch(0)
    twin, again = copied((model, optimizer))
    random_grads(twin.parameters(), torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.step()


def test_set_epoch_reaches_an_optimizer_behind_a_wrapper(seed):
    """Lightning hands out an object with a copy of the optimizer's __dict__: what is set on it is lost."""
    model, optimizer = build("epoch")
    wrapper = object.__new__(type("Wrapped", (FusedGradDropAdamW,), {}))
    wrapper.__dict__ = dict(optimizer.__dict__)
    wrapper.set_epoch(1)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    assert 0.3 < optimizer.active_fraction()[0] < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_pickle_of_an_older_version_gets_the_keys_that_are_new(seed):
    """Pickles skip the constructor; a key that a version has added is missing in them."""
    model, optimizer = build("plain")
    state = optimizer.__getstate__()
    ours = {"mask", "seed", "masked", "bias_correction", "moment_dtype", "epoch", "completed_steps", "epoch_history"}
    state["param_groups"] = [{k: v for k, v in group.items() if k not in ours} for group in state["param_groups"]]
    again = FusedGradDropAdamW.__new__(FusedGradDropAdamW)
    again.__setstate__(state)
    assert all(ours <= set(group) for group in again.param_groups)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    again.step()


def test_a_lambda_can_be_deepcopied(seed):
    model = Encoder()
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(p=lambda epoch: 0.5))
    twin, again = copy.deepcopy((model, optimizer))
    for one, other in ((model, optimizer), (twin, again)):
        train(other, one.parameters(), range(3), seed)
    assert state_bits(model, optimizer) == state_bits(twin, again)
