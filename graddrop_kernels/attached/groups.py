"""What attach_mask keeps in an optimizer's own parameter groups, as plain values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..groups.blocks import find_blocks, parameter_blocks
from ..groups.names import canonical_name
from ..groups.options import GROUP_DEFAULTS
from ..policies import Policy, PolicyBook

# As in a group of FusedGradDropAdamW, and the steps of each parameter, which that has in its state.
KEYS = ("mask", "seed", "masked", "epoch", "epoch_was_set", "completed_steps", "epoch_history", "param_steps")
_GIVEN = ("mask", "seed", "masked")  # the masks are those of a file only if these are the same
_SHARED = ("epoch", "epoch_was_set")  # a new group takes them from the others


class MaskedGroups:
    """Brings our keys into an optimizer's groups: when a mask is attached, and into each group that comes later, also
    out of a checkpoint.
    """

    def __init__(self, book: PolicyBook, mask: Policy | None, seed: int, masked: str | None) -> None:
        self._book = book
        self._given: dict[str, Any] = {"mask": book.add(mask), "seed": seed, "masked": masked}
        self._known: list[tuple[dict[str, Any], tuple[Any, ...]]] = []  # each group, and its values of _GIVEN

    def bring(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives every group our keys. Raises ValueError for a group whose mask has become another one."""
        groups = optimizer.param_groups
        for group in groups:
            if "param_steps" not in group:
                self._begin(group, optimizer, groups[0])
        all_facts = [tuple(group[key] for key in _GIVEN) for group in groups]
        goes_on = tuple(self._given.values()) in all_facts
        seen = {id(group): facts for group, facts in self._known}
        for index, (group, facts) in enumerate(zip(groups, all_facts)):
            known = seen.get(id(group)) or next((facts for _, facts in self._known[index : index + 1]), None)
            # A group that goes on from a checkpoint has the mask of then, or has none, or has one of its own.
            if known is None and group["completed_steps"] and not goes_on and group["mask"] is not None:
                known = tuple(self._given.values())
            if known is not None and facts != known:
                raise ValueError(_other_mask(index, group, known))
            missing = len(group["params"]) - len(group["param_steps"])
            if missing:  # the user has put parameters into the group, or taken some out
                group["param_steps"] = [*group["param_steps"], *[0] * missing][: len(group["params"])]
        if not all(id(group) in seen for group in groups):  # else some of them, as DeepSpeed steps each by itself
            self._known = list(zip(groups, all_facts))

    def _begin(self, group: dict[str, Any], optimizer: torch.optim.Optimizer, first: dict[str, Any]) -> None:
        own = "completed_steps" in group  # of a FusedGradDropAdamW, whose checkpoint this optimizer has loaded
        states = [optimizer.state.get(param, {}) if own else {} for param in group["params"]]
        group["mask"] = self._book.add(group.get("mask", self._given["mask"]))
        for key in KEYS[1:-1]:
            shared = first.get(key, GROUP_DEFAULTS[key]) if key in _SHARED else GROUP_DEFAULTS[key]
            group.setdefault(key, self._given.get(key, shared))
        group["param_steps"] = [int(state.get("step", 0)) for state in states]

    def check_file(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Raises ValueError for a state dict that cannot go on under the attached mask."""
        for index, (group, own) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups)):
            if "param_steps" not in group:
                raise ValueError(
                    f"parameter group {index} of this state dict was saved without attach_mask: load it before the "
                    "mask is attached, which then begins with step 0"
                )
            if tuple(group.get(key) for key in _GIVEN) != tuple(own[key] for key in _GIVEN):
                raise ValueError(_other_mask(index, group, tuple(own[key] for key in _GIVEN)))
            theirs, ours = (each.get("param_names") for each in (group, own))
            if theirs is not None and ours is not None and list(theirs) != list(ours):
                raise ValueError(
                    f"parameter group {index} of this state dict has its parameters in another order, or others: "
                    f"it begins with {list(theirs)[:2]}, the optimizer's with {list(ours)[:2]}"
                )


def keys_of_user(group: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ours that a group had before a mask was attached. Of a checkpoint's only that the group is dense."""
    if "param_steps" in group:
        return {"mask": None} if group["mask"] is None else {}
    return {key: group[key] for key in KEYS if key in group}


def _other_mask(index: int, group: Mapping[str, Any], known: tuple[Any, ...]) -> str:
    found = ", ".join(f"{key}={group.get(key)!r}" for key in _GIVEN)
    given = ", ".join(f"{key}={value!r}" for key, value in zip(_GIVEN, known))
    return (
        f"parameter group {index} has gone {group.get('completed_steps', 0)} steps under {found}, and the mask "
        f"attached to it is {given}: a run goes on bit for bit only under the same mask; attach that one"
    )


def name_params(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.Tensor]] | None, model: nn.Module | None,
    policy: Policy | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Gives the groups the names of their parameters, and the blocks of the model if the policy needs them.

    Returns:
        What was put into each group.
    """
    added: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    if named is None and model is None:
        return added
    names = {id(param): canonical_name(name) for name, param in (named or list(model.named_parameters()))}  # type: ignore[union-attr]
    tensors = [param for group in optimizer.param_groups for param in group["params"]]
    if unknown := sum(id(param) not in names for param in tensors):
        raise ValueError(
            f"{unknown} of {len(tensors)} parameters of the optimizer are not among the named ones, and masks are "
            "drawn by name: give the model, or the named_parameters, that the optimizer was made from"
        )
    for group, mine in zip(optimizer.param_groups, added):
        own = [names[id(param)] for param in group["params"]]
        if "param_names" not in group:
            mine["param_names"] = own
    needs_blocks = policy is not None and policy.needs_blocks and policy.layers is None
    known = any("blocks" in group or "no_blocks" in group for group in optimizer.param_groups)
    if model is not None and needs_blocks and not known:
        try:
            blocks = find_blocks(model)
            holders = parameter_blocks(model, blocks)
        except ValueError as error:
            for mine in added:
                mine["no_blocks"] = str(error)
        else:
            for group, mine in zip(optimizer.param_groups, added):
                mine["blocks"] = [name for name, _ in blocks]
                mine["param_blocks"] = [holders.get(id(param)) for param in group["params"]]
    for group, mine in zip(optimizer.param_groups, added):
        group.update(mine)
    return added
