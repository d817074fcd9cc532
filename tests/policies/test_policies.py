"""Mask policies: every row of the paper under its own name, draws recomputed by hand."""

import hashlib
import inspect
import math

import pytest
import torch
from toy import Encoder, bits, random_grads

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
    SkipUpdate,
    param_groups,
)
from graddrop_kernels.policies import POLICIES
from graddrop_kernels.policies.clock import Clock, PlanContext

# Philox4x32-10 from its paper (Salmon et al., SC 2011), on plain ints: shares no line with the library.


def philox(counter, key):
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def draw16(name, seed, domain, draw, i):
    key = int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little"
    )
    q = i // 8
    word = philox((q % 2**32, q // 2**32, draw % 2**32, domain), key)[i // 2 % 4]
    return word >> 16 if i % 2 else word & 0xFFFF


ELEMENT, BLOCK, BUCKET = 0, 1, 2


def draws(name, param, seed, domain, draw):
    flat = [draw16(name, seed, domain, draw, i) for i in range(param.numel())]
    return torch.tensor(flat).view(param.shape)


@pytest.mark.parametrize(
    "counter, key, words",  # the known answers of Random123
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_philox_of_these_tests(counter, key, words):
    assert tuple(philox(counter, key)) == words


# The table of the paper's methods.

T = 3
P_3 = [0.9, 0.9 - 1 / 3, 0.9 - 2 / 3]
KEEP_4 = {name: torch.arange(36).view(6, 6) % 4 == 1 for name in ("layer.1.linear.weight",)}


def scale_of(p):
    return 65536 / (65536 - round(p * 65536))


# name: policy, unit, redrawn, the factor on what is kept by epoch, meaning of dropping
TABLE = {
    "SFT": (None, None, "never", [1.0] * T, None),
    "GradDrop": (GradDrop(), "element", "step", [scale_of(0.2)] * T, "gradient"),
    "GradDrop(p)": (GradDrop(p=0.35), "element", "step", [scale_of(0.35)] * T, "gradient"),
    "GradDrop, first form": (GradDrop(0.4, every="epoch"), "element", "epoch", [scale_of(0.4)] * T, "gradient"),
    "Anneal-GradDrop": (GradDrop(p=LinearAnneal(epochs=T)), "element", "step", [scale_of(p) for p in P_3], "gradient"),
    "Layer-GradDrop": (LayerGradDrop(), "block", "step", [1.0] * T, "gradient"),
    "Layer-GradDrop by epoch": (LayerGradDrop(0.5, every="epoch"), "block", "epoch", [1.0] * T, "gradient"),
    "Anneal-Layer-GradDrop": (LayerGradDrop(p=LinearAnneal(epochs=T)), "block", "step", [1.0] * T, "gradient"),
    "GradDrop-Epoch": (GradDropEpoch(epochs=T), "element", "accumulates", [1.0] * T, "frozen"),
    "GradDrop-Epoch-Toggle": (GradDropEpoch(epochs=T, toggle=True), "element", "partition", [1.0] * T, "frozen"),
    "GradFreeze-TopDown": (GradFreeze(epochs=T, direction="top_down"), "block", "accumulates", [1.0] * T, "frozen"),
    "GradFreeze-BottomUp": (GradFreeze(epochs=T, direction="bottom_up"), "block", "accumulates", [1.0] * T, "frozen"),
    "fixed": (FixedMask(KEEP_4), "element", "never", [1.0] * T, "frozen"),
    "fixed, scaled": (FixedMask(KEEP_4, scale=1.75), "element", "never", [1.75] * T, "frozen"),
}
STEPS = 12  # an epoch: enough that a block of p = 0.2 is both kept and dropped


def observe(policy, seed):
    """Train with gradients of 1 and tell from parameters and moments alone what the policy did.

    Returns (unit, redrawn, {scales} by epoch, {meanings}), as in the table.
    """
    lr, beta1, weight_decay = 0.01, 0.8, 0.25
    model = Encoder(blocks=12)
    optimizer = FusedGradDropAdamW(
        param_groups(model, weight_decay), lr=lr, betas=(beta1, 0.95), mask=policy, seed=seed
    )
    watched = {
        name: param
        for name, param in model.named_parameters()
        if name.endswith("linear.weight") and name.startswith("layer.")
    }
    if isinstance(policy, FixedMask):
        watched = {name: param for name, param in watched.items() if name in policy.shapes}
    masks, scales, meanings = [], [], set()
    for epoch in range(T):
        optimizer.set_epoch(epoch)
        found = set()
        masks.append([])
        for _ in range(STEPS):
            with torch.no_grad():
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
            before = {name: (param.detach().clone(), *moments(optimizer, param)) for name, param in watched.items()}
            optimizer.step()
            keep = {}
            for name, param in watched.items():
                p, m, v = before[name]
                new_m, new_v = moments(optimizer, param)
                g = (new_m - beta1 * m) / (
                    1 - beta1
                )  # the masked, scaled gradient that the first moment saw; 0 where the gradient was dropped
                untouched = (new_m == m) & (new_v == v) & (param == p)
                keep[name] = (g > 0.5) & ~untouched
                found |= {round(value, 3) for value in g[keep[name]].tolist()}
                if untouched.any():
                    meanings.add("frozen")
                dropped = ~keep[name] & ~untouched
                if dropped.any():
                    assert (
                        torch.allclose(new_m[dropped], beta1 * m[dropped], rtol=1e-6, atol=0)
                        and (new_v[dropped] <= v[dropped]).all()
                    )
                    assert not torch.equal(param[dropped], p[dropped])  # weight decay and momentum go on
                    meanings.add("gradient")
            masks[-1].append(keep)
        scales.append(found)
    return unit_of(masks), redrawn(masks), scales, meanings


def moments(optimizer, param):
    state = optimizer.state.get(param, {})
    return tuple(state[key].clone() if key in state else torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq"))


def unit_of(masks):
    tensors = [mask for epoch in masks for step in epoch for mask in step.values()]
    if all(mask.all() for mask in tensors):
        return None
    return "block" if all(mask.all() or not mask.any() for mask in tensors) else "element"


def redrawn(masks):
    whole = [[torch.cat([mask.flatten() for mask in step.values()]) for step in epoch] for epoch in masks]
    if any(not torch.equal(epoch[0], step) for epoch in whole for step in epoch):
        return "step"
    first, second, third = (epoch[0] for epoch in whole)
    if torch.equal(first, second) and torch.equal(second, third):
        return "never"
    if (first <= second).all() and (second <= third).all() and third.all():
        return "accumulates"
    if torch.equal(first.int() + second.int() + third.int(), torch.ones_like(first, dtype=torch.int)):
        return "partition"
    return "epoch"


@pytest.mark.parametrize("row", TABLE)
def test_every_row_of_the_paper(row, seed):
    policy, unit, when, scales, meaning = TABLE[row]
    got_unit, got_when, got_scales, got_meaning = observe(policy, seed)
    assert (got_unit, got_when) == (unit, when)
    assert got_meaning == ({meaning} if meaning else set())
    for epoch, (found, scale) in enumerate(zip(got_scales, scales)):
        assert found and all(abs(value - scale) < 2e-3 * scale for value in found), (epoch, found, scale)


def test_the_scale_is_the_inverse_of_the_exact_keep_probability():
    """E[mask * scale] = 1 for the quantised p, exactly; 1/(1-p) of the p asked for is off by up to 2^-16."""
    for p in (0.2, 0.1, 1 / 3, 0.9, 0.999, 2e-5):
        plan = GradDrop(p=p).plan(context(), None)
        dropped = sum(u < plan.threshold for u in range(65536))
        assert dropped == round(p * 65536)
        assert plan.scale * (65536 - dropped) / 65536 == 1.0


def test_defaults_of_the_table():
    def defaults(cls):
        return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}

    empty = inspect.Parameter.empty
    assert defaults(GradDrop) == {"p": 0.2, "every": "step"}
    assert defaults(GaussianGradDrop) == {"p": 0.2}
    assert defaults(LayerGradDrop) == {"p": 0.2, "every": "step", "layers": None}
    assert defaults(GradDropEpoch) == {"epochs": None, "toggle": False, "storage": "recompute"}
    assert defaults(GradFreeze) == {"epochs": None, "direction": "top_down", "blocks_per_epoch": None, "layers": None}
    assert defaults(FixedMask) == {"masks": empty, "scale": 1.0}
    assert defaults(RandomMask) == {"density": None}
    assert defaults(SkipUpdate) == {"p": 0.5}
    assert defaults(SampleBlocks) == {"k": empty, "every": empty, "layers": None, "idle_state": "keep"}
    assert defaults(CycleBlocks) == {"every": empty, "order": "forward", "layers": None, "idle_state": "keep"}
    assert defaults(LinearAnneal) == {"epochs": empty, "start": 0.9, "end": "paper"}
    assert defaults(ExponentialAnneal) == {"start": empty, "decay": empty}
    assert set(POLICIES) == {
        "GradDrop",
        "GaussianGradDrop",
        "LayerGradDrop",
        "GradDropEpoch",
        "GradFreeze",
        "FixedMask",
        "RandomMask",
        "SampleBlocks",
        "CycleBlocks",
        "TrainRows",
        "SkipUpdate",
    }


@pytest.mark.parametrize(
    "policy",
    [GradDrop(), LayerGradDrop(p=0.4), GradDropEpoch(epochs=2), GradFreeze(epochs=2), FixedMask(KEEP_4)],
    ids=repr,
)
@pytest.mark.parametrize("masked", ["gradient", "frozen"])
def test_masked_overrides_the_meaning(policy, masked, seed):
    model = Encoder(blocks=6)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=policy, masked=masked, seed=seed)
    optimizer.set_epoch(0)
    generator = torch.Generator().manual_seed(seed)
    dropped_any = False
    for _ in range(4):
        keep = {name: optimizer.mask(param) for name, param in model.named_parameters()}
        before = {
            name: (param.detach().clone(), *moments(optimizer, param)) for name, param in model.named_parameters()
        }
        random_grads(model.parameters(), generator)
        optimizer.step()
        for name, param in model.named_parameters():
            p, m, v = before[name]
            off = ~keep[name]
            dropped_any |= bool(off.any())
            if masked == "frozen":
                assert bits(param[off]) == bits(p[off])
                assert [bits(moment[off]) for moment in moments(optimizer, param)] == [bits(m[off]), bits(v[off])]
            else:
                assert torch.allclose(moments(optimizer, param)[0][off], 0.9 * m[off], rtol=1e-6, atol=0)
            if keep[name].any():
                assert not torch.equal(param[keep[name]], p[keep[name]])
    assert dropped_any


# Draws.


def context(epoch=0, completed_steps=0, history=(), seed=0, frozen=False, blocks=(), count_active_steps=True):
    return PlanContext(Clock(epoch, completed_steps, history), seed, frozen, count_active_steps, blocks)


@pytest.mark.parametrize("p", [0.2, 0.81])
def test_element_masks_by_hand(p, seed):
    """Every step: the draw is the parameter's own step, 0 first."""
    model = Encoder(blocks=2)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(p=p), seed=seed)
    model.head.bias.requires_grad_(False)  # no gradient: its step does not advance
    for step in range(3):
        for name, param in model.named_parameters():
            own_step = 0 if name == "head.bias" else step
            expected = draws(name, param, seed, ELEMENT, own_step) >= round(p * 65536)
            assert torch.equal(optimizer.mask(name), expected)
        random_grads(
            [param for param in model.parameters() if param.requires_grad], torch.Generator().manual_seed(seed)
        )
        optimizer.step()


def test_element_masks_of_an_epoch_by_hand(seed):
    model = Encoder(blocks=1)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDrop(p=0.3, every="epoch"), seed=seed)
    for epoch in (0, 1, 5):
        optimizer.set_epoch(epoch)
        for _ in range(2):
            for name, param in model.named_parameters():
                assert torch.equal(optimizer.mask(name), draws(name, param, seed, ELEMENT, epoch) >= round(0.3 * 65536))
            random_grads(model.parameters(), torch.Generator().manual_seed(seed))
            optimizer.step()


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 4096])
@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("storage", ["bitpacked", "recompute"])
def test_buckets_by_hand(epochs, toggle, storage, seed):
    model = Encoder(blocks=1)
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=GradDropEpoch(epochs, toggle, storage), seed=seed)
    for epoch in {0, epochs // 2, epochs - 1}:
        optimizer.set_epoch(epoch)
        for name, param in model.named_parameters():
            bucket = (draws(name, param, seed, BUCKET, 0) * epochs) >> 16
            assert torch.equal(optimizer.mask(name), bucket == epoch if toggle else bucket <= epoch)


class Wrapper(torch.nn.Module):
    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def test_wrapped_names_have_the_masks_of_the_bare_ones(seed):
    bare, wrapped = Encoder(blocks=1), Encoder(blocks=1)
    wrapped.layer[0] = Wrapper("_checkpoint_wrapped_module", Wrapper("_fsdp_wrapped_module", wrapped.layer[0]))
    wrapped = Wrapper("module", Wrapper("_orig_mod", wrapped))
    masks = []
    for model in (bare, wrapped):
        optimizer = FusedGradDropAdamW(model.named_parameters(), seed=seed)
        masks.append([optimizer.mask(param) for param in model.parameters()])
    assert any(
        "module._orig_mod.layer.0._checkpoint_wrapped_module._fsdp_wrapped_module.linear" in name
        for name, _ in wrapped.named_parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize("how", ["param_groups", "layers"])
def test_block_masks_by_hand_and_alike_in_every_group(every, how, seed):
    """One draw a block, whatever group its parameters are in; the draw is the group's completed steps, or the epoch."""
    model = Encoder(blocks=5)
    policy = LayerGradDrop(p=0.45, every=every, layers="layer.*" if how == "layers" else None)
    if how == "layers":
        named = list(model.named_parameters())
        groups = [
            {"params": named[start::3], "lr": 0.1 / (start + 1)} for start in range(3)
        ]  # a block's parameters scattered over three groups
    else:
        groups = param_groups(model)
    optimizer = FusedGradDropAdamW(groups, mask=policy, seed=seed)
    assert (
        sum(any(name.startswith("layer.0.") for name in group["param_names"]) for group in optimizer.param_groups) >= 2
    )
    seen = set()
    for step in range(12):
        epoch = step // 4
        optimizer.set_epoch(epoch)
        draw = epoch if every == "epoch" else step
        for name, param in model.named_parameters():
            inside = name.startswith("layer.")
            block = ".".join(name.split(".")[:2])
            kept = not inside or draw16(block, seed, BLOCK, draw, 0) >= round(0.45 * 65536)
            seen.add((inside, kept))
            assert torch.equal(optimizer.mask(param), torch.full(param.shape, kept)), (step, name)
            assert torch.equal(optimizer.mask(param, step=step), optimizer.mask(param))
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()
    assert seen == {(False, True), (True, True), (True, False)}


def test_share_of_kept_blocks_over_many_steps(seed):
    p, steps, blocks = 0.3, 3000, [f"layer.{i}" for i in range(8)]
    policy = LayerGradDrop(p=p)
    plan = lambda step, block: policy.plan(context(completed_steps=step, seed=seed, blocks=tuple(blocks)), block)
    kept = torch.tensor([[plan(step, block).kind == "keep" for block in blocks] for step in range(steps)]).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / math.sqrt(kept.numel())
    assert ((kept.mean(0) - (1 - p)).abs() < 5 * sigma / math.sqrt(steps)).all()  # each block
    correlation = torch.corrcoef(kept.T) - torch.eye(len(blocks))
    assert correlation.abs().max() < 5 / math.sqrt(steps)  # blocks fall independently
    assert abs(torch.corrcoef(torch.stack((kept[1:, 0], kept[:-1, 0])))[0, 1]) < 5 / math.sqrt(steps)  # and so do steps


@pytest.mark.parametrize("policy", [LayerGradDrop(p=0.5), GradFreeze(epochs=5)], ids=repr)
@pytest.mark.parametrize("masked", ["gradient", "frozen"])
def test_a_frozen_block_does_not_advance_its_steps(policy, masked, seed):
    model = Encoder(blocks=5)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=policy, masked=masked, seed=seed)
    active = dict.fromkeys(dict(model.named_parameters()), 0)
    for step in range(6):
        optimizer.set_epoch(step // 2)
        for name in active:
            active[name] += int(optimizer.mask(name).all())
        random_grads(model.parameters(), torch.Generator().manual_seed(step))
        optimizer.step()
    for name, param in model.named_parameters():
        assert optimizer.state[param]["step"].item() == (active[name] if masked == "frozen" else 6), name
    assert any(steps < 6 for steps in active.values())
    assert [group["completed_steps"] for group in optimizer.param_groups] == [6] * 4


# GradFreeze and GradDropEpoch.


@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
@pytest.mark.parametrize(
    "blocks, epochs, per_epoch",
    [(24, 12, None), (24, 12, 2), (12, 5, None), (5, 12, None), (7, 3, 4), (1, 4, None), (4, 9, 1)],
)
def test_how_many_blocks_are_trained(direction, blocks, epochs, per_epoch):
    names = tuple(f"encoder.layer.{i}" for i in range(blocks))
    policy = GradFreeze(epochs=epochs, direction=direction, blocks_per_epoch=per_epoch)
    for epoch in range(epochs + 3):
        kept = [policy.plan(context(epoch=epoch, frozen=True, blocks=names), name).kind == "keep" for name in names]
        count = math.ceil(blocks * (epoch + 1) / epochs) if per_epoch is None else per_epoch * (epoch + 1)
        count = min(count, blocks)
        assert kept == (
            [False] * (blocks - count) + [True] * count
            if direction == "top_down"
            else [True] * count + [False] * (blocks - count)
        )
        assert policy.plan(context(epoch=epoch, frozen=True, blocks=names), None).kind == "keep"  # outside all blocks
    assert all(policy.plan(context(epoch=epochs * blocks, blocks=names), name).kind == "keep" for name in names)


def test_the_papers_24_layers():
    """Figure 2: after 3 epochs 6 of 24 layers are unfrozen."""
    names = tuple(f"layer.{i}" for i in range(24))
    policy = GradFreeze(epochs=12, blocks_per_epoch=2)
    assert [name for name in names if policy.plan(context(epoch=2, blocks=names), name).kind == "keep"] == list(
        names[18:]
    )


@pytest.mark.parametrize("epochs", [2, 5, 12])
def test_every_element_is_trained_in_exactly_one_toggle_epoch(epochs, seed):
    weight = torch.nn.Parameter(torch.zeros(200, 251))
    share = {}
    for toggle in (True, False):
        optimizer = FusedGradDropAdamW([("weight", weight)], mask=GradDropEpoch(epochs, toggle), seed=seed)
        share[toggle] = []
        for epoch in range(epochs):
            optimizer.set_epoch(epoch)
            share[toggle].append(optimizer.mask(weight))
    once = torch.stack(share[True]).sum(0)
    assert torch.equal(once, torch.ones_like(once))
    for epoch in range(epochs):
        assert torch.equal(share[False][epoch], torch.stack(share[True][: epoch + 1]).any(0))
        sigma = math.sqrt(1 / epochs * (1 - 1 / epochs) / weight.numel())
        assert abs(share[True][epoch].double().mean() - 1 / epochs) < 5 * sigma + epochs / 65536
    assert share[False][-1].all()


@pytest.mark.parametrize("toggle", [False, True])
def test_after_the_last_epoch_the_last_one_goes_on(toggle, seed):
    optimizer = FusedGradDropAdamW(
        [("weight", torch.nn.Parameter(torch.zeros(40, 40)))], mask=GradDropEpoch(3, toggle), seed=seed
    )
    optimizer.set_epoch(2)
    last = optimizer.mask("weight")
    if toggle:
        with pytest.warns(UserWarning, match="after the last epoch"):
            optimizer.set_epoch(3)
    else:
        optimizer.set_epoch(3)
    assert torch.equal(optimizer.mask("weight"), last)
    assert last.all() == (not toggle)


# Gaussian.


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_gaussian_factor_has_mean_1_and_variance_p_over_1_minus_p(p, seed):
    numel = 200_000
    weight = torch.nn.Parameter(torch.zeros(numel))
    optimizer = FusedGradDropAdamW([("weight", weight)], betas=(0.0, 0.5), mask=GaussianGradDrop(p=p), seed=seed)
    factors = []
    for _ in range(2):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        factors.append(2 * optimizer.state[weight]["exp_avg"].double())  # beta1 = 0: the gradient itself
    variance = p / (1 - p)
    for factor in factors:
        assert abs(factor.mean() - 1) < 5 * math.sqrt(variance / numel)
        assert abs(factor.var() / variance - 1) < 5 * math.sqrt(2 / numel) + 2e-5  # p is quantised
        standard = (factor - 1) / math.sqrt(variance)
        assert abs((standard**3).mean()) < 5 * math.sqrt(15 / numel) and abs((standard**4).mean() - 3) < 5 * math.sqrt(
            96 / numel
        )
    assert abs(torch.corrcoef(torch.stack(factors))[0, 1]) < 5 / math.sqrt(numel)
    assert optimizer.mask(weight).all() and optimizer.active_fraction() == [1.0]


def test_gaussian_with_p_0_is_plain_adamw(seed):
    results = []
    for mask in (GaussianGradDrop(p=0), GradDrop(p=0.0), None):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer = FusedGradDropAdamW([weight], mask=mask)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            random_grads([weight], generator)
            optimizer.step()
        results.append(bits(weight))
    assert results[0] == results[1] == results[2]
