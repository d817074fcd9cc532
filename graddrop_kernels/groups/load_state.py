"""Loads state dicts. Decides which values come from the file and which stay the optimizer's own."""

from collections.abc import Callable
from typing import Any

import torch

from .names import canonical_name
from .param_state import has_master

# These describe the live model, not the training: a file never overrides them.
_STRUCTURE = (
    "param_names", "blocks", "block", "param_blocks", "no_blocks", "notes", "name", "capturable", "differentiable",
    "master_weights", "stochastic_rounding",
)  # fmt: skip
# A run continues bit for bit only if these are the same.
_MASKING = ("mask", "seed", "masked", "bias_correction")


def load(
    optimizer: torch.optim.Optimizer, torchs_load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any],
    strict: bool,
) -> None:  # fmt: skip
    """Does what load_state_dict() does: calls ``torchs_load`` with a state dict adapted to the optimizer's groups."""
    prepared: dict[str, Any] = {}

    def fit(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        prepared.update(prepare(state_dict, optimizer.param_groups, strict))
        return prepared

    last_hook = optimizer.register_load_state_dict_pre_hook(fit)  # after the user's own, which may adapt the file
    try:
        torchs_load(state_dict)
    finally:
        last_hook.remove()
    restore_moment_dtypes(optimizer, prepared)


def prepare(state_dict: dict[str, Any], groups: list[dict[str, Any]], strict: bool) -> dict[str, Any]:
    """Returns a copy of ``state_dict`` adapted to ``groups``. Keys of ours that it lacks are filled in, and parameters
    are brought into our order by name.

    Raises:
        ValueError: names or shapes differ; with strict also another policy, seed, masked or bias_correction.
    """
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}")
    for index, (saved, group) in enumerate(zip(saved_groups, groups)):
        if "param_names" in saved and "param_names" in group:
            saved["params"] = _in_our_order(index, saved, group)
        for key in _MASKING:
            if strict and key in saved and saved[key] != group[key]:
                raise ValueError(
                    f"the state dict was saved with {key}={saved[key]!r} in parameter group {index}, "
                    f"this optimizer has {key}={group[key]!r}: its masks would differ from the saved run's; "
                    "construct it with the same one, or load with strict=False to go on under this one's"
                )
            saved[key] = group[key]
        for key in _STRUCTURE:
            saved.pop(key, None)
        for saved_id, param in zip(saved["params"], group["params"]):
            _check_saved_state(index, state_dict["state"].get(saved_id), param)
        # Absent keys (a state dict of torch.optim.AdamW) would vanish from the group.
        for key, value in group.items():
            if key != "params":
                saved.setdefault(key, value)
    return {**state_dict, "param_groups": saved_groups}


def _check_saved_state(index: int, state: dict[str, Any] | None, param: torch.Tensor) -> None:
    if not state:
        return
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in state:
            raise ValueError(
                f"the state dict has no {key!r} for a parameter of group {index}: "
                "it is another kind of optimizer's, not AdamW's"
            )
        if key != "step" and state[key].shape != param.shape:
            raise ValueError(
                f"{key} in the state dict has shape {tuple(state[key].shape)} where a parameter of group {index} "
                f"has {tuple(param.shape)}: the state dict is of another model, or its parameters are in another order "
                "(named parameters are matched by name)"
            )


def _in_our_order(index: int, saved: dict[str, Any], group: dict[str, Any]) -> list[Any]:
    """The saved parameter ids of a group, reordered by name. Ids that are names themselves stay as they are:
    torch.distributed.checkpoint has ordered them.
    """
    params: list[Any] = saved["params"]
    if params and isinstance(params[0], str):
        return params
    theirs, ours = ([canonical_name(name) for name in names] for names in (saved["param_names"], group["param_names"]))
    if theirs == ours:  # also where two parameters have one name
        return params
    ids = dict(zip(theirs, params))
    if set(ids) != set(ours):
        missing, extra = sorted(set(ours) - set(ids))[:3], sorted(set(ids) - set(ours))[:3]
        raise ValueError(
            f"parameter group {index} of the state dict is of other parameters: "
            f"it lacks {missing or 'none of ours'}, it has {extra or 'none'} besides"
        )
    return [ids[name] for name in ours]


def restore_moment_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Undoes torch's cast of float32 moments and masters to the parameter's dtype. Makes step counts float32, in which
    the kernels count. Removes masters where none are wanted.

    Moments of any other dtype come from a model of that dtype, and for them the cast is right.
    """
    ids = (saved for group in state_dict["param_groups"] for saved in group["params"])
    rows = ((group, param) for group in optimizer.param_groups for param in group["params"])
    for saved, (group, param) in zip(ids, rows):
        for key, value in state_dict["state"].get(saved, {}).items():
            if key == "step":
                step = torch.as_tensor(value, dtype=torch.float32).to(param.device)
                optimizer.state[param]["step"] = step.clone() if step is value else step
            elif isinstance(value, torch.Tensor) and value.dtype == torch.float32 != optimizer.state[param][key].dtype:
                optimizer.state[param][key] = value.to(param.device, copy=True)
        if not has_master(param, group):
            optimizer.state.get(param, {}).pop("master_param", None)
