"""MaskPlan and Clock: histories, ages, expected ages, active shares, against counters that are counted one by one."""

import itertools
import random
from collections import Counter

import pytest
import torch
from torch import nn
from toy import Encoder, random_grads

from graddrop_kernels import (
    ExponentialAnneal,
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    param_groups,
)
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.policies import Clock, PlanContext, Policy
from graddrop_kernels.policies.policy import KEPT_EPOCHS
from graddrop_kernels.policies.schedules import quantize


def clock_after(epochs_of_steps, epoch, policy=Policy()):  # noqa: B008 (immutable)
    """The clock before one more step in ``epoch``, moved as the optimizer moves it: through its text, step by step."""
    text, completed_steps = "", 0
    for past in epochs_of_steps:
        text = Clock.of(past, completed_steps, text).with_this_step(policy.fold)
        completed_steps += 1
    return Clock.of(epoch, completed_steps, text)


def random_epochs(dice, last=6, steps=25):
    """The epoch of each step: runs of steps, epochs left out, visited again, and gone back to."""
    epochs = []
    while len(epochs) < steps:
        epochs += [dice.randrange(last + 1)] * dice.randrange(1, 6)
    return epochs[:steps]


def context(clock, frozen=True, count_active_steps=True, **others):
    return PlanContext(clock, 0, frozen, count_active_steps, **others)


def test_history_and_its_text():
    assert Clock.of(3, 99, "") == Clock(3, 99, ())
    assert Clock.of(7, 99, "0:0,1:44,7:90") == Clock(7, 99, ((0, 0), (1, 44), (7, 90)))
    assert Clock.of(7, 99, "~123,1:44,7:90") == Clock(7, 99, ((1, 44), (7, 90)), folded=123)
    for clock, text in (
        (Clock(0, 0, ()), "0:0"),
        (Clock(1, 44, ((0, 0),)), "0:0,1:44"),
        (Clock(1, 60, ((0, 0), (1, 44))), "0:0,1:44"),  # an epoch is written once
        (Clock(0, 60, ((0, 0), (1, 44))), "0:0,1:44,0:60"),  # and again when it comes again
        (Clock(1, 60, ((1, 44),), folded=123), "~123,1:44"),
    ):
        assert clock.with_this_step(Policy().fold) == text


FOLDING = [
    GradDrop(p=0.3),
    GradDrop(p=LinearAnneal(epochs=300, start=0.7)),
    GradDrop(p=LinearAnneal(epochs=300, start=0.7), every="epoch"),
    GradDrop(p=lambda epoch: 0.1 * (epoch % 7)),
    GradDropEpoch(epochs=5),
    GradDropEpoch(epochs=250),
    GradDropEpoch(epochs=90, toggle=True),
]


@pytest.mark.parametrize("policy", FOLDING, ids=range(len(FOLDING)))
def test_folded_epochs_leave_every_plan_as_it_was(policy, seed):
    """Plans of a folded history are equal, bit for bit, to those of one that names every epoch."""
    dice = random.Random(seed)
    whole, folded, completed_steps = "", "", 0
    for epoch in range(300):
        for _ in range(dice.randrange(1, 4)):
            plans = [policy.plan(context(Clock.of(epoch, completed_steps, text)), None) for text in (whole, folded)]
            assert plans[0] == plans[1], epoch
            folded = Clock.of(epoch, completed_steps, folded).with_this_step(policy.fold)
            if not whole.rpartition(",")[2].startswith(f"{epoch}:"):
                whole += f",{epoch}:{completed_steps}"
            completed_steps += 1
    entries = folded.count(":")
    assert entries <= KEPT_EPOCHS + (policy.epochs if isinstance(policy, GradDropEpoch) else 0)
    assert Clock.of(0, completed_steps, whole).history != Clock.of(0, completed_steps, folded).history


@pytest.mark.parametrize(
    "mask", [None, GradDrop(0.3, every="epoch"), GradDrop(LinearAnneal(9000)), GradDropEpoch(7), LayerGradDrop(0.5)]
)
def test_what_a_group_keeps_does_not_grow_with_the_epochs(mask, seed):
    dice = random.Random(seed)
    named = [("layer.0.weight", nn.Parameter(torch.zeros(2)))]
    mask = LayerGradDrop(0.5, layers="layer.*") if isinstance(mask, LayerGradDrop) else mask
    optimizer = FusedGradDropAdamW(named, mask=mask, masked="frozen" if mask else None)
    named[0][1].grad = torch.ones(2)
    sizes, epoch = [], 0
    for _ in range(400):
        optimizer.set_epoch(epoch)
        for _ in range(dice.randrange(1, 3)):
            optimizer.step()
        epoch += dice.randrange(1, 3)
        sizes.append(len(optimizer.param_groups[0]["epoch_history"]))
    assert max(sizes[200:]) < 500, sizes[-1]  # some digits more
    again = FusedGradDropAdamW(named, mask=mask, masked="frozen" if mask else None)
    again.load_state_dict(optimizer.state_dict())
    assert again.masking.clocks() == optimizer.masking.clocks()


def test_folded_steps_of_a_policy_before_count_for_every_bucket():
    clock = clock_after(range(100), 200)  # plain AdamW
    assert clock.folded == 65536 * (100 - KEPT_EPOCHS)
    assert GradDropEpoch(epochs=3).plan(context(clock), None).ages == (101,) * 3


def test_steps_by_epoch_are_the_steps_that_were_made(seed):
    dice = random.Random(seed)
    for _ in range(100):
        epochs = random_epochs(dice, steps=dice.randrange(40))
        assert clock_after(epochs, dice.randrange(9)).steps_by_epoch() == Counter(epochs)


def test_the_optimizer_keeps_this_history(seed):
    dice = random.Random(seed)
    model = Encoder(blocks=2)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=GradDropEpoch(epochs=4))
    epochs = random_epochs(dice, last=3, steps=12)
    counted = []
    for epoch in epochs:
        optimizer.set_epoch(epoch)
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        if dice.random() < 0.3:
            model.layer.zero_grad()
            model.head.zero_grad()  # only the embeddings are left, and with them their group
        else:
            counted.append(epoch)
        optimizer.step()
    for group in optimizer.param_groups:
        expected = epochs if group["name"] == "dense" else counted
        assert group["completed_steps"] == len(expected), group["name"]
        clock = Clock.of(0, group["completed_steps"], group["epoch_history"])
        assert clock.steps_by_epoch() == Counter(expected)


@pytest.mark.parametrize("toggle", [False, True])
def test_ages_of_buckets_are_what_counters_count(toggle, seed):
    """ages[b]: the steps in which bucket b was trained, this one included; 0 for a bucket that is not trained now."""
    dice = random.Random(seed)
    for epochs in (2, 3, 5, 6):
        policy = GradDropEpoch(epochs=epochs, toggle=toggle)
        for _ in range(25):
            past, now = random_epochs(dice), dice.randrange(8)
            counters = [0] * epochs
            for epoch in [*past, now]:
                last = min(epoch, epochs - 1)  # after the last epoch the last one goes on
                active = [last] if toggle else range(last + 1)
                for bucket in active:
                    counters[bucket] += 1
            plan = policy.plan(context(clock_after(past, now)), None)
            expected = [counters[bucket] if bucket in active else 0 for bucket in range(epochs)]
            assert list(plan.ages) + [0] * (epochs - len(plan.ages)) == expected
            assert (plan.kind, plan.first_bucket, plan.last_bucket, plan.frozen) == (
                "bucket",
                active[0],
                active[-1],
                True,
            )
            assert not policy.plan(context(clock_after(past, now), count_active_steps=False), None).ages
            assert not policy.plan(context(clock_after(past, now), frozen=False), None).ages


SCHEDULES = [
    0.3,
    ExponentialAnneal(0.8, 0.5),
    LinearAnneal(epochs=3, start=0.7, end="zero"),
    lambda epoch: 0.2 * (epoch % 3),
]


@pytest.mark.parametrize("p", SCHEDULES, ids=["fixed", "exponential", "linear", "callable"])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_expected_age_is_that_of_all_possible_masks(p, every, seed):
    """Every way in which an element can be kept and dropped, its active steps weighed by the way's probability."""
    dice = random.Random(seed)
    keep = lambda epoch: 1 - quantize(p(epoch) if callable(p) else p) / 65536
    for _ in range(6):
        past, now = random_epochs(dice, last=3, steps=8), dice.randrange(4)
        steps = [*past, now]
        draws = list(range(len(steps))) if every == "step" else steps  # of each step: one of its own, or its epoch's
        epoch_of_draw = dict(zip(draws, steps))
        age = weight = 0.0
        for kept in itertools.product((False, True), repeat=len(epoch_of_draw)):
            active = dict(zip(epoch_of_draw, kept))
            if not active[draws[-1]]:
                continue  # not active now: its age does not matter
            probability = 1.0
            for draw, epoch in epoch_of_draw.items():
                probability *= keep(epoch) if active[draw] else 1 - keep(epoch)
            age += probability * sum(active[draw] for draw in draws)
            weight += probability
        plan = GradDrop(p=p, every=every).plan(context(clock_after(past, now)), None)
        t = len(steps)
        assert 1 + (t - 1) * plan.age_rate == pytest.approx(age / weight, rel=1e-12)
        assert GradDrop(p=p, every=every).plan(context(clock_after(past, now), frozen=False), None).age_rate == 1.0
        assert (
            GradDrop(p=p, every=every).plan(context(clock_after(past, now), count_active_steps=False), None).age_rate
            == 1.0
        )
    assert GradDrop(p=p, every=every).plan(context(Clock(2, 0, ())), None).age_rate == 1.0


@pytest.mark.parametrize("buckets", [1, 2, 3, 5, 7, 100, 4095, 4096])
def test_active_share_of_buckets_counted_over_all_draws(buckets):
    sizes = Counter((u * buckets) >> 16 for u in range(65536))
    for first, last in {
        (0, 0),
        (0, buckets - 1),
        (buckets // 2, buckets // 2),
        (0, buckets // 3),
        (buckets // 3, buckets - 1),
    }:
        plan = MaskPlan("bucket", buckets=buckets, first_bucket=first, last_bucket=last)
        assert plan.active_fraction * 65536 == sum(sizes[bucket] for bucket in range(first, last + 1))


def test_active_share_of_the_other_kinds():
    assert MaskPlan("keep").active_fraction == 1.0
    assert MaskPlan("off").active_fraction == 0.0
    assert MaskPlan("gaussian", scale=0.5).active_fraction == 1.0
    assert MaskPlan("bernoulli", threshold=16384).active_fraction == 0.75


@pytest.mark.parametrize("policy", [LayerGradDrop(p=0.5), GradFreeze(epochs=3)], ids=repr)
def test_blocks_count_their_own_steps_or_all(policy):
    blocks = ("layer.0", "layer.1", "layer.2")
    clock = Clock(1, 41, ((0, 0), (1, 20)))
    for block in blocks:
        assert policy.plan(context(clock, blocks=blocks), block).global_step == 0  # the parameter's own step
        assert policy.plan(context(clock, blocks=blocks, count_active_steps=False), block).global_step == 42
        assert (
            policy.plan(context(clock, blocks=blocks, frozen=False, count_active_steps=False), block).global_step == 0
        )
    assert policy.plan(context(clock, blocks=blocks, count_active_steps=False), None) == MaskPlan("keep")


def test_p_0_costs_nothing():
    for policy in (GradDrop(p=0.0), GradDrop(p=LinearAnneal(epochs=1, end="zero")), GradDropEpoch(epochs=1)):
        assert policy.plan(context(Clock(0, 7, ((0, 0),)), frozen=False), None) == MaskPlan("keep")
    assert GradDropEpoch(epochs=5).plan(context(Clock(4, 7, ((0, 0),)), frozen=False), None) == MaskPlan("keep")


# What the numbers are for. With a constant gradient, no decay and no eps, an AdamW step that is corrected by the
# element's own count of active steps is exactly lr; one corrected by all steps is not, for one that wakes up late.


@pytest.mark.parametrize("bias_correction", ["active", "global"])
@pytest.mark.parametrize(
    "mask",
    [
        GradDropEpoch(epochs=3),
        GradDropEpoch(epochs=3, toggle=True, storage="bitpacked"),
        GradFreeze(epochs=3, layers="layer.*"),
    ],
    ids=["epoch", "toggle", "freeze"],
)
def test_size_of_the_steps_of_late_units(mask, bias_correction, seed):
    lr, beta1, beta2 = 0.125, 0.25, 1 - 2.0**-8
    named = [(f"layer.{i}.weight", nn.Parameter(torch.zeros(90))) for i in range(3)]
    optimizer = FusedGradDropAdamW(
        named, lr, (beta1, beta2), 0.0, 0.0, mask=mask, bias_correction=bias_correction, seed=seed
    )
    own_steps = {name: torch.zeros(90, dtype=torch.int64) for name, _ in named}
    moved_more_than_lr = False
    for t in range(1, 13):
        optimizer.set_epoch((t - 1) // 4)
        before = {name: param.detach().clone() for name, param in named}
        for name, param in named:
            param.grad = torch.ones_like(param)
            own_steps[name] += optimizer.mask(name)
        told = {name: optimizer.mask(name) for name, _ in named}
        optimizer.step()
        for name, param in named:
            keep, n = told[name], own_steps[name][told[name]].double()
            corrected_by = n if bias_correction == "active" else torch.full_like(n, t)
            m, v = 1 - beta1**n, 1 - beta2**n  # the moments of n gradients of 1
            expected = lr * (m / (1 - beta1**corrected_by)) / (v / (1 - beta2**corrected_by)).sqrt()
            moved = (before[name] - param.detach())[keep].double()
            assert torch.allclose(moved, expected, rtol=1e-5, atol=0), (t, name)
            assert (param.detach() == before[name])[~keep].all()
            moved_more_than_lr |= bool((moved > 1.3 * lr).any())
    assert moved_more_than_lr == (bias_correction == "global")


def test_size_of_the_steps_of_random_frozen_elements(seed):
    """Their own ages are random; the expected one corrects the mean step, to the size of lr."""
    lr, p = 0.125, 0.6
    weight = nn.Parameter(torch.zeros(20_000))
    optimizer = FusedGradDropAdamW(
        [("weight", weight)], lr, (0.75, 0.9375), 0.0, 0.0, mask=GradDrop(p=p), masked="frozen", seed=seed
    )
    ages = torch.zeros(20_000, dtype=torch.int64)
    for t in range(1, 9):
        keep = optimizer.mask(weight)
        ages += keep
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        scale, n = 65536 / (65536 - round(p * 65536)), ages[keep].double()
        age = 1 + (t - 1) * (1 - round(p * 65536) / 65536)
        expected = (
            lr * scale * (1 - 0.75**n) / (1 - 0.75**age) / (scale**2 * (1 - 0.9375**n) / (1 - 0.9375**age)).sqrt()
        )
        assert torch.allclose((before - weight.detach())[keep].double(), expected, rtol=1e-5, atol=0)
