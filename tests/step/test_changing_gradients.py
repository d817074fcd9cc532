"""Other gradients in every step, as experts and unused parameters give them: prepared once, and right all the same."""

import copy
import gc
import random
import weakref

import pytest
import torch
from costs import calls_of
from torch import nn
from toy import bits

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    LayerGradDrop,
    available_backends,
)
from graddrop_kernels.step import prepare

BACKENDS = [name for name in ("cpu", "reference") if name in available_backends()]
MODES = {
    "plain": {"mask": None},
    "graddrop": {"mask": GradDrop(0.3), "masked": "frozen"},
    "clipping": {"mask": GradDrop(0.3), "max_grad_norm": 0.5},
    "clipping-after": {"mask": LayerGradDrop(0.5, layers="layer.*"), "max_grad_norm": 0.5, "norm_after_mask": True},
    "masters": {"mask": GradDrop(0.3), "master_weights": True},
    "epoch": {"mask": GradDropEpoch(3, storage="bitpacked")},
    "blocks": {"mask": LayerGradDrop(0.5, layers="layer.*"), "masked": "frozen"},
    "fixed": {"mask": FixedMask({"layer.1.weight": torch.eye(6, 5, dtype=torch.bool)})},
}


def made(mode: str, backend: str = "auto", count: int = 8) -> tuple[list[nn.Parameter], FusedGradDropAdamW]:
    """Parameters of several dtypes, strides and groups, some of them in 16 bits, complex or with amsgrad."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    named = []
    for i in range(count):
        weight = draw(6, 5) if i % 4 < 2 else draw(5, 6).t()
        named.append((f"layer.{i}.weight", nn.Parameter(weight.to(torch.bfloat16 if i % 3 == 2 else torch.float32))))
        named.append((f"layer.{i}.bias", nn.Parameter(draw(5).to(torch.float64 if i % 5 == 4 else torch.float32))))
    groups = [{"params": named[:4]}, {"params": named[4:-2], "amsgrad": True}, {"params": named[-2:], "lr": 0.5}]
    optimizer = FusedGradDropAdamW(groups, lr=0.03, weight_decay=0.2, backend=backend, **MODES[mode])
    return [param for _, param in named], optimizer


def everything(optimizer: FusedGradDropAdamW) -> list:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    counts = [(group["completed_steps"], group["epoch_history"]) for group in optimizer.param_groups]
    state = [{key: bits(value) for key, value in optimizer.state.get(param, {}).items()} for param in params]
    return [counts, list(map(bits, params)), state]


def disturb(dice: random.Random, params: list[nn.Parameter], optimizer: FusedGradDropAdamW) -> None:
    """What users do between steps to a parameter, with or without a gradient. ``dice`` decides."""
    param = dice.choice(params)
    state = optimizer.state.get(param)
    what = dice.choice(["nothing", "state", "memory", "strides", "forgotten", "grad strides"])
    if what == "state" and state:
        key = dice.choice(sorted(state))
        state[key] = state[key].clone()
    elif what == "memory":
        param.data = param.detach().clone()
    elif what == "strides" and param.dim() == 2:
        param.data = param.detach().t().contiguous().t() if param.is_contiguous() else param.detach().contiguous()
    elif what == "forgotten" and state:
        optimizer.state.pop(param)
    elif what == "grad strides" and param.dim() == 2 and param.grad is not None:
        param.grad = param.grad.t().contiguous().t() if param.grad.is_contiguous() else param.grad.contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_steps_are_those_of_an_optimizer_that_prepares_anew(mode, backend, seed):
    pairs = [made(mode, "auto" if backend == "cpu" else backend) for _ in range(2)]
    dice, present = random.Random(f"{seed} {mode} {backend}"), [True] * len(pairs[0][0])
    for step in range(25):
        if dice.random() < 0.7:  # else as in the step before
            present = [dice.random() < dice.choice([0.2, 0.5, 0.9]) for _ in present]
        own = dice.getrandbits(32)
        for params, optimizer in pairs:
            optimizer.set_epoch(step // 9)
            generator = torch.Generator().manual_seed(step)
            for param, given in zip(params, present):
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = grad if given else None
            disturb(random.Random(own), params, optimizer)
        pairs[1][1]._stepper.prepared = None
        for _, optimizer in pairs:
            optimizer.step()
        assert everything(pairs[0][1]) == everything(pairs[1][1]), step
        assert [bits(o.grad_norm) for _, o in pairs][0] == bits(pairs[1][1].grad_norm)


def steps(params, optimizer, patterns):
    for pattern in patterns:
        for param, given in zip(params, pattern):
            param.grad = torch.ones_like(param) if given else None
        optimizer.step()


def random_patterns(seed: int, steps: int, count: int, share: float = 0.5) -> list[list[bool]]:
    dice = random.Random(seed)
    return [[dice.random() < share for _ in range(count)] for _ in range(steps)]


def test_a_parameter_is_checked_once(seed, monkeypatch):
    params, optimizer = made("graddrop", count=20)
    checked, check = [], prepare.check_row
    monkeypatch.setattr(prepare, "check_row", lambda *row: checked.append(row[3]) or check(*row))
    patterns = random_patterns(seed, 30, len(params))
    steps(params, optimizer, patterns)
    assert sorted(map(id, checked)) == sorted(
        id(param) for i, param in enumerate(params) if any(p[i] for p in patterns)
    )


@pytest.mark.skipif("cpu" not in available_backends(), reason="csrc was not compiled")
def test_other_gradients_cost_calls_per_step_and_not_per_parameter(seed):
    counts = []
    for count in (50, 200):
        params = [nn.Parameter(torch.ones(4)) for _ in range(count)]
        optimizer = FusedGradDropAdamW(params, mask=None)
        *patterns, last = [[True] * count, *random_patterns(seed, 5, count)]
        steps(params, optimizer, patterns)
        for param, given in zip(params, last):
            param.grad = torch.ones_like(param) if given else None
        counts.append(calls_of(optimizer.step))
    assert counts[1] < counts[0] + 20 and counts[0] < 500, counts


def test_absent_parameters_are_not_looked_at(seed):
    params, optimizer = made("plain")
    steps(params, optimizer, [[True] * len(params)])
    params[0].untyped_storage().resize_(0)
    optimizer.state[params[1]]["exp_avg"] = torch.ones(1)
    optimizer.state[params[3]].clear()
    before = copy.deepcopy(optimizer.state[params[1]])
    for patterns in ([False, False, True, False, *[True] * (len(params) - 4)],) * 2:
        steps(params, optimizer, [patterns])
    assert str(optimizer.state[params[1]]) == str(before)
    with pytest.raises(ValueError, match=r"exp_avg of 'layer.0.bias' has shape"):
        steps(params, optimizer, [[False, True, *[False] * (len(params) - 2)]])
    with pytest.raises(ValueError, match=r"'layer.0.weight' needs 120 bytes"):
        steps(params, optimizer, [[True, *[False] * (len(params) - 1)]])
    optimizer.state.pop(params[1])
    steps(params, optimizer, [[False, True, True, True, *[False] * (len(params) - 4)]])
    assert [int(optimizer.state[param]["step"]) for param in params[1:4]] == [1, 4, 1]


def test_nothing_of_an_absent_parameter_is_kept(seed):
    params, optimizer = made("graddrop")
    steps(params, optimizer, [[True] * len(params), *random_patterns(seed, 3, len(params))])
    steps(params, optimizer, [[i % 2 == 0 for i in range(len(params))]] * 2)
    gc.disable()
    try:
        for param in params:
            param.grad = None
            refs = [weakref.ref(value) for value in optimizer.state[param].values()]
            optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
            assert not any(ref() is not None for ref in refs)
            assert not weakref.getweakrefs(param)
    finally:
        gc.enable()
    steps(params, optimizer, [[True] * len(params)])


def test_another_state_in_the_memory_and_with_the_id_of_an_absent_ones(seed):
    """An absent parameter's moment is replaced, while other steps find new parameters."""
    params, optimizer = made("plain")
    only = lambda *some: [i in some for i in range(len(params))]
    steps(params, optimizer, [only(0, 1)])
    state = optimizer.state[params[0]]
    memory, old_id, others = state["exp_avg"].untyped_storage(), id(state.pop("exp_avg")), []
    for _ in range(1000):
        half = torch.empty(0, dtype=torch.float16).set_(memory, 0, (6, 5))
        if id(half) == old_id:
            break
        others.append(half)
    assert id(half) == old_id
    state["exp_avg"] = half
    steps(params, optimizer, [only(1), only(1, 2), only(3)])
    with pytest.raises(ValueError, match=r"moments of 'layer.0.weight' have different dtypes"):
        steps(params, optimizer, [only(0, 1)])


def test_a_refused_parameter_leaves_the_others_ready(seed):
    params, optimizer = made("graddrop")
    everyone = [True] * len(params)
    steps(params, optimizer, [[i != 3 for i in range(len(params))]])
    before = everything(optimizer)
    for _ in range(2):
        params[3].grad = torch.ones(5).expand(5)
        params[3].data = torch.ones(1).expand(5)
        with pytest.raises(ValueError, match="overlapping memory"):
            optimizer.step()
        assert [part for i, part in enumerate(everything(optimizer)[2]) if i != 3] == [
            part for i, part in enumerate(before[2]) if i != 3
        ]
    params[3].data = torch.ones(5)
    steps(params, optimizer, [everyone])
    assert [int(optimizer.state[param]["step"]) for param in params[2:5]] == [2, 1, 2]


def test_groups_without_gradients_count_no_step(seed):
    params, optimizer = made("blocks")
    dice, counts = random.Random(seed), [0, 0, 0]
    steps(params, optimizer, [[True] * len(params)])
    for _ in range(12):
        present = [dice.random() < 0.2 for _ in params]
        steps(params, optimizer, [present])
        for index, own in enumerate((present[:4], present[4:-2], present[-2:])):
            counts[index] += any(own)
    assert [group["completed_steps"] - 1 for group in optimizer.param_groups] == counts
