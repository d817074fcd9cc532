"""Repairs loads of DeepSpeed's universal checkpoints (ds_to_universal), from which another number of ranks can resume.

DeepSpeed loads them past the optimizer's load_state_dict(). In stage 3 it gives every parameter group the values of the
file's first one. It also gives all partitions the same step tensor, which then counts each of their steps. Both are put
right here.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..groups import load_state

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW

_Found = tuple[list[dict[str, Any]], list[tuple[torch.Tensor, float]]]  # groups; flat partitions and their steps

# This describes DeepSpeed 0.19: runtime/base_optimizer.py, load_hp_checkpoint_state_from_checkpoint_dir(), and
# runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3().


def repair_loads(zero: Any, optimizer: "FusedGradDropAdamW") -> None:
    """Makes a load of a universal checkpoint leave ``optimizer`` as its load_state_dict() would, in stages 1 and 2.

    ``zero`` is DeepSpeed's optimizer around it. A load raises ValueError, before anything has changed, for another
    policy, seed or ``masked`` than the file's; for ``amsgrad``, as the file has no maxima; and for a group of which
    some process has no element.
    """

    def read(folder: str, load_optimizer_states: bool) -> _Found:
        # Groups are loaded in either case. DeepSpeed keeps the groups' parameters under one of two names.
        params_of = getattr(zero, "bit16_groups", None) or zero.bf16_groups
        for index, group in enumerate(optimizer.param_groups):
            others = torch.distributed.get_world_size(zero.real_dp_process_group[index]) - 1
            numel = sum(param.numel() for param in params_of[index])
            if others * group["params"][0].numel() >= numel:
                raise ValueError(
                    f"parameter group {index} has {numel} elements, none in the last process, and DeepSpeed's stages "
                    "1 and 2 then cannot load a universal checkpoint: put its parameters into a larger group, or use "
                    "fewer processes, or stage 3"
                )
        return _groups_of(_file(folder), optimizer), []

    _around_load(zero, optimizer, read)


def repair_stage3_loads(
    zero: Any, optimizer: "FusedGradDropAdamW", flats: list[tuple[int, torch.Tensor]]
) -> None:
    """As ``repair_loads``, in stage 3. ``flats`` are (parameter group, flat partition) of every partition here."""

    def read(folder: str, load_optimizer_states: bool) -> _Found:
        if not load_optimizer_states:
            return [], []
        file = _file(folder)
        groups, steps = _groups_of(file, optimizer), _steps_of(file)
        return groups, [(flat, steps[index]) for index, flat in flats]

    _around_load(zero, optimizer, read)


def _around_load(zero: Any, optimizer: "FusedGradDropAdamW", read: Callable[[str, bool], _Found]) -> None:
    load = zero.load_state_dict

    def load_state_dict(  # as the engine calls it
        *, checkpoint_folder: str | None = None, load_optimizer_states: bool = True, **more: Any
    ) -> None:
        groups, steps = read(checkpoint_folder, load_optimizer_states) if checkpoint_folder else ([], [])
        load(checkpoint_folder=checkpoint_folder, load_optimizer_states=load_optimizer_states, **more)
        for group, values in zip(optimizer.param_groups, groups):
            params = group["params"]
            group.clear()
            group.update(values, params=params)
        for flat, step in steps:
            optimizer.state[flat]["step"] = torch.tensor(step, device=flat.device)
        optimizer.reloaded()

    zero.load_state_dict = load_state_dict


def _file(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, "zero", "optimizer_state.pt")
    file: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return file


def _groups_of(file: dict[str, Any], optimizer: "FusedGradDropAdamW") -> list[dict[str, Any]]:
    """Returns the values of each group: the file's, but ours where they describe the model."""
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise ValueError(
            "amsgrad=True: DeepSpeed's universal checkpoints have no max_exp_avg_sq, which would begin again from 0; "
            "go on with as many ranks as the checkpoint is of, or train without amsgrad"
        )
    found = {"state": {}, "param_groups": file["param_groups"]}
    values: list[dict[str, Any]] = load_state.prepare(found, optimizer.param_groups, optimizer.strict)["param_groups"]
    return values


def _steps_of(file: dict[str, Any]) -> list[float]:
    """Returns the number of steps that the parameters of each group have made."""
    states = file["optimizer_state_dict"]["state"]
    steps: list[float] = []
    for index, group in enumerate(file["param_groups"]):
        found = {float(states[number]["step"]) for number in group["params"]}
        if len(found) != 1:
            raise ValueError(
                f"the partitions of parameter group {index} have made different numbers of steps, {sorted(found)}, and "
                "a universal checkpoint does not keep them apart: go on with as many ranks as it is of"
            )
        steps += found
    return steps
