"""What the optimizer tells of its masks: mask(), active_fraction(), FixedMask."""


import pytest
import torch
from torch import nn
from toy import Encoder, bits, build, every_policy, random_grads, snapshot, train

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradDropEpoch, GradFreeze, param_groups

# mask() and active_fraction().


@every_policy
@pytest.mark.parametrize("masked", ["gradient", "frozen", "update"])
def test_mask_tells_beforehand_what_the_step_uses(policy, masked, seed):
    if policy in ("plain", "gaussian", "rows", "skip-update"):
        masked = None
    model, optimizer = build(policy, masked=masked, seed=seed)
    for step in range(10):
        optimizer.set_epoch(step // 3)
        told = {name: optimizer.mask(param) for name, param in model.named_parameters()}
        before = {
            name: optimizer.state[param]["exp_avg"].clone() if param in optimizer.state else None
            for name, param in model.named_parameters()
        }
        values = {name: param.detach().clone() for name, param in model.named_parameters()}
        for param in model.parameters():
            param.grad = torch.full_like(
                param, 1e3 * 4.0**step
            )  # larger than all before: no kept element can be mistaken for a decaying one
        optimizer.step()
        for name, param in model.named_parameters():
            assert (
                told[name].dtype is torch.bool and told[name].shape == param.shape and told[name].device == param.device
            )
            exp_avg = optimizer.state[param]["exp_avg"]
            used = exp_avg.abs() > (torch.zeros_like(exp_avg) if before[name] is None else before[name].abs())
            if policy in ("rows", "skip-update") or masked == "update":  # the moments do not tell
                used = param != values[name]
            if policy != "gaussian":  # whose factor may be small or negative, and never drops
                assert torch.equal(used, told[name]), (step, name)
            else:
                assert told[name].all()


@every_policy
def test_mask_of_another_step(policy, seed):
    """mask(step=k) before, at and after step k is the mask of step k; of the current epoch where epochs matter."""
    model, optimizer = build(policy, seed=seed)
    optimizer.set_epoch(0)
    steps = range(6)
    before = {name: [optimizer.mask(name, step=step) for step in steps] for name, _ in model.named_parameters()}
    for step in steps:
        for name, param in model.named_parameters():
            assert torch.equal(optimizer.mask(param), before[name][step])
        random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
        optimizer.step()
    for name, param in model.named_parameters():
        for step in steps:
            assert torch.equal(optimizer.mask(param, step=step), before[name][step])


@every_policy
def test_asking_changes_nothing(policy, seed):
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), range(3), seed)
    before = snapshot(optimizer)
    for name, param in model.named_parameters():
        optimizer.mask(param)
        optimizer.mask(name, step=17)
    optimizer.active_fraction()
    assert snapshot(optimizer) == before


def test_mask_by_a_wrapped_name():
    _, optimizer = build("graddrop")
    assert torch.equal(
        optimizer.mask("module.layer.0._orig_mod.linear.weight"), optimizer.mask("layer.0.linear.weight")
    )


@every_policy
def test_active_fraction_is_the_share_of_the_next_mask(policy, seed):
    model, optimizer = build(policy, Encoder(blocks=8), seed=seed)
    for step in range(8):
        optimizer.set_epoch(step // 2)
        for group, fraction in zip(optimizer.param_groups, optimizer.active_fraction(), strict=True):
            numel = sum(param.numel() for param in group["params"])
            kept = sum(int(optimizer.mask(param).sum()) for param in group["params"])
            random = policy.startswith(("graddrop", "epoch", "toggle", "random")) and group["mask"] is not None
            assert abs(fraction - kept / numel) <= (6 * (fraction * (1 - fraction) / numel) ** 0.5 if random else 1e-12)
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()


def test_active_fraction_numbers():
    model = Encoder(blocks=4)
    fractions = lambda mask, epoch=0, **arguments: _fractions(model, mask, epoch, **arguments)
    assert fractions(GradDrop(p=0.2)) == [1 - 13107 / 65536] * 2 + [1.0, 1.0]
    assert fractions(None) == [1.0] * 4
    assert fractions(GradFreeze(epochs=4), 2) == [0.75, 0.75, 1.0, 1.0]
    assert fractions(GradFreeze(epochs=4), 9) == [1.0] * 4
    assert fractions(GradDropEpoch(epochs=4), 1) == [0.5, 0.5, 1.0, 1.0]
    assert fractions(GradDropEpoch(epochs=4, toggle=True), 1) == [0.25, 0.25, 1.0, 1.0]
    assert fractions(GradDropEpoch(epochs=3)) == [21846 / 65536] * 2 + [
        1.0,
        1.0,
    ]  # ceil(65536 / 3) of the 16-bit draws fall into bucket 0
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, :3] = True
    assert fractions(FixedMask({"layer.2.linear.weight": mask})) == [1 - 33 / 144, 1.0, 1.0, 1.0]


def _fractions(model, mask, epoch):
    optimizer = FusedGradDropAdamW(param_groups(model), mask=mask)
    optimizer.set_epoch(epoch)
    return optimizer.active_fraction()


# FixedMask.


def test_an_optimizer_over_a_fixed_mask(seed):
    masks = {"weight": torch.rand(20, 30, generator=torch.Generator().manual_seed(seed)) < 0.3}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in (("weight", (20, 30)), ("bias", (20,)))}
    dense = {name: nn.Parameter(torch.ones(shape)) for name, shape in (("weight", (20, 30)), ("bias", (20,)))}
    optimizer = FusedGradDropAdamW(named.items(), lr=0.02, mask=FixedMask(masks, scale=3.0))
    plain = FusedGradDropAdamW(dense.items(), lr=0.02, mask=None)
    assert torch.equal(optimizer.mask("weight"), masks["weight"]) and optimizer.mask("bias").all()
    for step in range(4):
        random_grads(named.values(), torch.Generator().manual_seed(seed + step))
        dense["weight"].grad, dense["bias"].grad = named["weight"].grad * 3.0, named["bias"].grad.clone()
        optimizer.step()
        plain.step()
    assert bits(named["bias"]) == bits(dense["bias"])  # no entry: dense, and unscaled
    keep = masks["weight"]
    assert bits(named["weight"][keep]) == bits(dense["weight"][keep])
    assert (named["weight"][~keep] == 1).all() and (optimizer.state[named["weight"]]["exp_avg_sq"][~keep] == 0).all()
