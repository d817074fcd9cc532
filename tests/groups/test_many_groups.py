"""Costs of many groups and names: the calls of ours that an optimizer makes grow with their number, not its square."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from costs import calls_of
from torch import nn

from graddrop_kernels import FixedMask, FusedGradDropAdamW, GradDrop, GradFreeze, LayerGradDrop
from graddrop_kernels.groups.names import LayerMatch, match_layers

Named = list[tuple[str, nn.Parameter]]
LAYERS, FREEZE = LayerGradDrop(0.5, layers="layer.*"), GradFreeze(3, layers="layer.*")


def named(count: int) -> Named:
    return [(f"layer.{i // 2}.weight{i % 2}", nn.Parameter(torch.ones(2))) for i in range(count)]


def grouped(count: int, mask: Any) -> FusedGradDropAdamW:
    return FusedGradDropAdamW([{"params": [pair]} for pair in named(count)], mask=mask)


def fixed(count: int) -> FixedMask:
    return FixedMask({name: torch.ones(2, dtype=torch.bool) for name, _ in named(count)})


def growing(mask: Any) -> Callable[[int], Callable[[], None]]:
    def prepare(count: int) -> Callable[[], None]:
        (first, *others), optimizer = named(count), None
        optimizer = FusedGradDropAdamW([first], mask=mask)
        return lambda: [optimizer.add_param_group({"params": [pair]}) for pair in others]

    return prepare


def looks(count: int, look: Callable[[FusedGradDropAdamW], Any], mask: Any = LAYERS) -> Callable[[], Any]:
    optimizer = grouped(count, mask)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    return lambda: look(optimizer)


def reload(optimizer: FusedGradDropAdamW) -> list[float]:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer.active_fraction()


def every_mask(optimizer: FusedGradDropAdamW) -> None:
    for group in optimizer.param_groups:
        optimizer.mask(group["params"][0])
        optimizer.mask(group["param_names"][0])


def attach(optimizer: FusedGradDropAdamW) -> None:
    params = [group["params"][0] for group in optimizer.param_groups]
    optimizer.attach_pieces({param: [(f"layer.{i}.weight", 0, 0, 2)] for i, param in enumerate(params)})
    optimizer.active_fraction()


WORKS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "GradDrop": lambda count: lambda: grouped(count, GradDrop(0.2)),
    "LayerGradDrop": lambda count: lambda: grouped(count, LAYERS),
    "FixedMask": lambda count: lambda: grouped(count, fixed(count)),
    "one group of LayerGradDrop": lambda count: lambda: FusedGradDropAdamW(named(count), mask=LAYERS),
    "added, GradDrop": growing(GradDrop(0.2)),
    "added, LayerGradDrop": growing(LAYERS),
    "added to a FixedMask": lambda count: growing(fixed(1))(count),
    "load": lambda count: looks(count, reload),
    "step": lambda count: looks(count, lambda optimizer: (optimizer.step(), optimizer.step())),
    "step of GradFreeze": lambda count: looks(count, lambda own: (own.set_epoch(1), own.step()), FREEZE),
    "set_epoch": lambda count: looks(count, lambda optimizer: optimizer.set_epoch(1)),
    "masks": lambda count: looks(count, every_mask),
    "pieces": lambda count: looks(count, attach),
    "describe": lambda count: looks(count, lambda optimizer: optimizer.describe()),
}


@pytest.mark.parametrize("work", WORKS)
def test_twice_as_many_groups_cost_twice_as_many_calls(work):
    prepare = WORKS[work]
    prepare(8)()  # caches that live as long as the process
    small, large = calls_of(prepare(40)), calls_of(prepare(80))
    assert small > 40 and large < 2.3 * small, (small, large)


def test_blocks_found_in_parts_are_those_found_at_once(seed):
    dice = torch.Generator().manual_seed(seed)
    names = [f"decoder.layer.{i % 7}.weight{i}" for i in range(20)] + [f"layer.{i}.weight" for i in range(12)]
    names = [names[i] for i in torch.randperm(len(names), generator=dice)]
    match = LayerMatch(["*.layer.*", "layer.?"])
    for name in names:
        match.add([(name, True)])
    assert list(match.blocks()) == match_layers(["*.layer.*", "layer.?"], names)
    match.add([("a.layer.9.weight", True)])
    assert list(match.blocks()) == match_layers(["*.layer.*", "layer.?"], [*names, "a.layer.9.weight"])


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_group_with_a_block_inside_of_another_is_refused(inner_first):
    names = ["layer.0.layer.1.weight", "layer.0.weight"]
    first, second = names if inner_first else names[::-1]
    mask = LayerGradDrop(0.5, layers=["layer.*", "layer.*.layer.*"])
    mask = LayerGradDrop(0.5, layers=["layer.*.layer.*", "*.0"]) if inner_first else mask
    optimizer = FusedGradDropAdamW([(first, nn.Parameter(torch.ones(2)))], mask=GradDrop(0.5))
    with pytest.raises(ValueError, match=r"finds block 'layer.0.layer.1' inside block 'layer.0'"):
        optimizer.add_param_group({"params": [(second, nn.Parameter(torch.ones(2)))], "mask": mask})
    assert len(optimizer.param_groups) == 1


def test_a_group_added_later_brings_its_blocks_to_the_others():
    pairs = named(6)
    optimizer = FusedGradDropAdamW(pairs[2:4], mask=GradFreeze(3, layers="layer.*"))
    assert optimizer.masking.blocks(0) == ("layer.1",)
    optimizer.add_param_group({"params": pairs[4:]})
    optimizer.add_param_group({"params": pairs[:2]})
    assert {optimizer.masking.blocks(index) for index in range(3)} == {("layer.0", "layer.1", "layer.2")}
    assert optimizer.active_fraction() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="finds no block"):
        optimizer.add_param_group({"params": [("a", nn.Parameter(torch.ones(2)))], "mask": GradFreeze(3, layers="x.*")})
    assert optimizer.active_fraction() == [0.0, 1.0, 0.0]


def test_a_parameter_is_found_after_it_was_replaced_or_moved(seed):
    optimizer = grouped(4, GradDrop(0.2))
    params = [group["params"] for group in optimizer.param_groups]
    assert optimizer.masking.find("layer.1.weight0") == optimizer.masking.find(params[2][0]) == (2, 0)
    old, params[2][0] = params[2][0], nn.Parameter(torch.ones(2))
    assert optimizer.masking.find(params[2][0]) == (2, 0)
    with pytest.raises(KeyError, match="not a parameter"):
        optimizer.masking.find(old)
    optimizer.param_groups.reverse()
    optimizer._stepper.forget()
    assert optimizer.masking.find("layer.1.weight0") == (1, 0)
