"""SampleBlocks, CycleBlocks and RandomMask: what they train, that the rest stays bit for bit, and what they refuse."""

import copy
import math
from collections import Counter

import pytest
import torch
from toy import Encoder, random_grads

from graddrop_kernels import CycleBlocks, FusedGradDropAdamW, RandomMask, SampleBlocks, describe, param_groups

HYPERS = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3}


def make(mask, seed=7, **options):
    torch.manual_seed(seed)
    model = Encoder(blocks=5)
    groups = param_groups(model)
    return model, FusedGradDropAdamW(groups, mask=mask, seed=seed, **HYPERS, **options)


def block_of(name):
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), None)


def moved_blocks(model, optimizer, rng):
    """Steps once and returns the blocks of which anything has moved. All else of a block has kept its bits."""
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    moments = {name: copy.deepcopy(optimizer.state.get(param, {})) for name, param in model.named_parameters()}
    random_grads(model.parameters(), rng)
    optimizer.step()
    moved = set()
    for name, param in model.named_parameters():
        if not torch.equal(param, before[name]):
            moved.add(block_of(name))
        elif moments[name]:
            assert all(torch.equal(value, moments[name][key]) for key, value in optimizer.state[param].items()), name
    assert None in moved, "what is outside of the blocks is trained densely"
    return moved - {None}


def blocks_of(model):
    return sorted({block_of(name) for name, _ in model.named_parameters()} - {None})


@pytest.mark.parametrize("k, every", [(1, 1), (2, 3), (3, 2)])
def test_sampled_blocks_train_k_blocks_for_n_steps(k, every, seed):
    model, optimizer = make(SampleBlocks(k, every), seed)
    rng, turns = torch.Generator().manual_seed(seed), []
    for turn in range(6):
        active = [moved_blocks(model, optimizer, rng) for _ in range(every)]
        assert all(each == active[0] for each in active) and len(active[0]) == k, (turn, active)
        turns.append(tuple(sorted(active[0])))
    if k < len(blocks_of(model)):
        assert len(set(turns)) > 1, "other blocks are drawn"


def test_every_block_is_drawn_as_often(seed):
    """Each of L blocks in k / L of the draws: binomial, within 6 deviations."""
    _, optimizer = make(SampleBlocks(2, 1), seed)
    masking, draws, count = optimizer.masking, Counter(), 3000
    blocks = masking.blocks(0)
    for step in range(count):
        optimizer.param_groups[0]["completed_steps"] = step
        draws.update(block for block in blocks if masking.plan(0, block).kind == "keep")
    share = 2 / len(blocks)
    assert sum(draws.values()) == 2 * count
    for block in blocks:
        assert abs(draws[block] - count * share) < 6 * math.sqrt(count * share * (1 - share)), draws


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_blocks_in_turns(order, seed):
    model, optimizer = make(CycleBlocks(2, order), seed)
    rng, blocks, rounds = torch.Generator().manual_seed(seed), blocks_of(model), []
    for _ in range(4):
        turns = []
        for _ in blocks:
            first, second = (moved_blocks(model, optimizer, rng) for _ in range(2))
            assert first == second and len(first) == 1
            turns += first
        assert sorted(turns) == blocks, "one round trains every block"
        rounds.append(turns)
    expected = {"forward": blocks, "backward": blocks[::-1]}
    assert all(turns == expected.get(order, turns) for turns in rounds)
    assert order != "random" or len(set(map(tuple, rounds))) > 1 or len(blocks) < 3


@pytest.mark.parametrize("mask", [SampleBlocks(2, 3), CycleBlocks(3, "random"), RandomMask(0.3)], ids=repr)
def test_a_resume_in_the_middle_of_a_turn_has_the_same_bits(mask, seed):
    def train(model, optimizer, first, last):
        for step in range(first, last):
            random_grads(model.parameters(), torch.Generator().manual_seed(seed + step))
            optimizer.step()

    model, optimizer = make(mask, seed)
    train(model, optimizer, 0, 4)
    twin, resumed = make(mask, seed)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 4, 9)
    train(twin, resumed, 4, 9)
    for one, two in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one, two)


def test_random_mask_trains_the_same_share_in_every_step(seed):
    count = 1 << 16
    param = torch.nn.Parameter(torch.randn(count, generator=torch.Generator().manual_seed(seed)))
    optimizer = FusedGradDropAdamW([("weight", param)], mask=RandomMask(0.05), seed=seed, **HYPERS)
    before, keep = param.detach().clone(), optimizer.mask("weight")
    assert abs(keep.double().mean() - 0.05) < 6 * math.sqrt(0.05 * 0.95 / count)
    assert optimizer.active_fraction() == [round(0.05 * 65536) / 65536]
    dense = before[keep].clone().requires_grad_()
    plain = torch.optim.AdamW([dense], fused=True, **HYPERS)
    for step in range(20):
        grad = torch.randn(count, generator=torch.Generator().manual_seed(seed + step + 1))
        param.grad, dense.grad = grad, grad[keep].clone()
        optimizer.step()
        plain.step()
        optimizer.set_epoch(step)
        assert torch.equal(optimizer.mask("weight"), keep)
    assert torch.equal(param[~keep], before[~keep]) and not (param[keep] == before[keep]).any()
    assert torch.allclose(param[keep], dense, rtol=1e-5, atol=1e-7), "the others are those of AdamW, unscaled"


@pytest.mark.parametrize("density", [None, 0, 1, 1.0, -0.1, 2, math.nan, 1e-6, 1 - 1e-6, True, "0.5"])
def test_refused_densities(density):
    with pytest.raises(ValueError, match=r"RandomMask\(density=\)"):
        RandomMask(density)


@pytest.mark.parametrize(
    "make_policy, words",
    [
        (lambda: SampleBlocks(0, 1), r"SampleBlocks\(k=\)"), (lambda: SampleBlocks(1.0, 1), r"SampleBlocks\(k=\)"),
        (lambda: SampleBlocks(True, 1), r"SampleBlocks\(k=\)"), (lambda: SampleBlocks(1, 0), r"SampleBlocks\(every=\)"),
        (lambda: CycleBlocks(0), r"CycleBlocks\(every=\)"), (lambda: CycleBlocks(1, "up"), r"CycleBlocks\(order=\)"),
        (lambda: SampleBlocks(1, 1, layers=[]), r"SampleBlocks\(layers=\)"),
    ],
)  # fmt: skip
def test_refused_values(make_policy, words):
    with pytest.raises(ValueError, match=words):
        make_policy()


def test_more_blocks_than_there_are_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match=r"SampleBlocks\(k=99\).*give k at most"):
        make(SampleBlocks(99, 1))
    model, optimizer = make(None)
    groups = len(optimizer.param_groups)
    extra = {"params": [("extra.0.weight", torch.nn.Parameter(torch.ones(3)))], "mask": SampleBlocks(2, 1, "extra.*")}
    with pytest.raises(ValueError, match=r"SampleBlocks\(k=2\).*has 1"):
        optimizer.add_param_group(extra)
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize("mask", [SampleBlocks(2, 2), CycleBlocks(1), CycleBlocks(2, "random")], ids=repr)
def test_all_groups_change_at_once(mask, seed):
    """Though a group may miss steps, or come later: a turn goes by the group that has made most steps."""
    model = Encoder(blocks=5)
    groups = param_groups(model, per_block=True)
    late = [group for group in groups if group["name"].startswith("layer.4")]
    optimizer = FusedGradDropAdamW([group for group in groups if group not in late], mask=mask, seed=seed, **HYPERS)
    twin_model, twin = make(mask, seed)
    rng = torch.Generator().manual_seed(seed)
    for step in range(12):
        if step == 3:
            for group in late:
                optimizer.add_param_group({**group, "mask": mask})
        random_grads(model.parameters(), rng)
        random_grads(twin_model.parameters(), rng)
        for name, param in model.named_parameters():
            if name.startswith("layer.2") and step in (1, 4, 5):
                param.grad = None
        masking, theirs = optimizer.masking, twin.masking
        active = {
            block
            for index in masking.indices()
            for block in {record.unit for record in masking.records(index)} - {None}
            if masking.plan(index, block).kind == "keep"
        }
        wanted = {block for block in theirs.blocks(0) if theirs.plan(0, block).kind == "keep"}
        assert active == (wanted if step > 2 else wanted - {"layer.4"}), step
        optimizer.step()
        twin.step()


def test_describe_names_the_active_blocks(seed):
    _, optimizer = make(SampleBlocks(2, 3), seed)
    assert "active blocks" in describe(optimizer) and "2 of " in describe(optimizer)
