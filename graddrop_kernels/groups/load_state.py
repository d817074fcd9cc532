"""Loads state dicts. Decides which values come from the file and which stay the optimizer's own."""

import contextlib
import copy
import os
from collections.abc import Callable
from itertools import chain
from typing import Any, NoReturn

import torch

from ..policies import Clock, Policy, from_json
from ..policies.rows import Runs
from ..tensors.local import is_dtensor
from .masking import Masking
from .names import canonical_name
from .options import draws
from .param_state import STATE_TENSORS, has_master, in_rows, state_shape, wanted_moments
from .records import ParamRecord
from .spans import trained_rows

# These describe the live model and how it is stepped, not the training: a file never overrides them.
_STRUCTURE = (
    "blocks", "block", "param_blocks", "no_blocks", "notes", "name", "capturable", "differentiable", "master_weights",
    "stochastic_rounding", "stochastic_moments", "max_grad_norm", "norm_after_mask",
)  # fmt: skip
# A run continues bit for bit only if these are the same.
_MASKING = ("mask", "seed", "masked", "bias_correction")
_ADAMW = ("lr", "betas", "eps", "weight_decay")  # in every group of a file of Adam or AdamW


def load(
    optimizer: torch.optim.Optimizer, masking: Masking, torchs_load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any], strict: bool,
) -> None:  # fmt: skip
    """Does what load_state_dict() does: calls ``torchs_load`` with a state dict adapted to the optimizer's groups. A
    failure changes nothing, also when it comes after torch has replaced the state.
    """
    prepared: dict[str, Any] = {}
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}

    def fit(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        prepared.update(prepare(state_dict, optimizer.param_groups, strict, masking))
        return prepared

    last_hook = optimizer.register_load_state_dict_pre_hook(fit)  # after the user's own, which may adapt the file
    try:
        torchs_load(state_dict)
        make_own(optimizer, prepared)
    except BaseException:
        if optimizer.state is not before["state"]:
            optimizer.__setstate__(before)
        raise
    finally:
        last_hook.remove()


def prepare(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], strict: bool, masking: Masking | None = None
) -> dict[str, Any]:  # fmt: skip
    """Returns a copy of ``state_dict`` adapted to ``groups``. Keys of ours that it lacks are filled in. Where the file
    and ``groups`` have names, groups and parameters are brought into our order by name.

    ``masking``: that of the groups, where a state may have only some rows of its parameter.

    Raises:
        ValueError: another kind of optimizer's, or names or shapes differ. With strict also parameters that are grouped
            in another way, another policy, seed, masked or bias_correction, and masks drawn by position, not by name.
    """
    state = dict(state_dict["state"])
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    for index, saved in enumerate(saved_groups):
        if missing := [key for key in _ADAMW if key not in saved]:
            raise ValueError(
                f"parameter group {index} of the state dict has no {missing[0]!r}: it is another kind of optimizer's, "
                "not AdamW's"
            )
    saved_groups = _in_our_groups(saved_groups, groups, strict)
    for index, (saved, group) in enumerate(zip(saved_groups, groups)):
        if strict:
            _check_masking(index, saved, group, any(map(state.get, saved["params"])))
        saved_policy: Policy | None = None  # if its state may have some rows only
        if masking is not None and (saved_mask := saved.get("mask")) is not None and '"TrainRows"' in saved_mask:
            saved_policy = masking.policy(index) if saved_mask == group["mask"] else from_json(saved_mask)
        for key in _MASKING:
            saved[key] = group[key]
        for key in _STRUCTURE:
            saved.pop(key, None)
        if "param_names" in group:  # otherwise the file's are taken, as in torch, and masks stay those of the saved run
            saved.pop("param_names", None)
        records = masking.records(index) if masking is not None else [None] * len(group["params"])
        for saved_id, param, record in zip(saved["params"], group["params"], records):
            rows = None if record is None else trained_rows(param, record)
            if record is not None and state.get(saved_id):
                state[saved_id] = _in_our_rows(state[saved_id], saved_policy, param, record, rows)
            _check_saved_state(index, state.get(saved_id), param, rows)
        if "completed_steps" not in saved:  # of torch.optim.AdamW
            steps = [int(state[saved_id]["step"]) for saved_id in saved["params"] if state.get(saved_id)]
            saved["completed_steps"] = max(steps, default=0)
            saved["epoch_history"] = Clock.history_of_plain(saved["completed_steps"])
        # Keys that it lacks would vanish from the group.
        for key, value in group.items():
            if key != "params":
                saved.setdefault(key, value)
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _check_masking(index: int, saved: dict[str, Any], group: dict[str, Any], has_state: bool) -> None:
    """Raises ValueError if the group's masks would differ from the saved run's. A file of torch has none."""
    remedy = "or go on under this one's with strict=False, which load_state_dict() and the constructor take"
    for key in _MASKING:
        if key in saved and saved[key] != group[key]:
            theirs, ours = _from_difference(repr(saved[key]), repr(group[key]))
            raise ValueError(
                f"the state dict was saved with {key}={theirs} in parameter group {index}, "
                f"this optimizer has {key}={ours}: its masks would differ from the saved run's; "
                f"construct it with the same one, {remedy}"
            )
    if draws(group) and has_state and "mask" in saved and "param_names" in group and "param_names" not in saved:
        raise ValueError(
            f"parameter group {index} of the state dict has no names, and this optimizer's has: masks and rounding "
            "noise are drawn by name, without names by position, and would differ from the saved run's; construct it "
            f"from model.parameters(), {remedy}"
        )


def _from_difference(*texts: str) -> list[str]:
    """Texts that differ, cut to what shows it: those of thousands of rows are long."""
    start = max(len(os.path.commonprefix(texts)) - 60, 0) if max(map(len, texts)) > 300 else 0
    return [f"{'...' * (start > 0)}{text[start : start + 300]}{'...' * (len(text) > start + 300)}" for text in texts]


def _in_our_rows(
    state: dict[str, Any], saved_policy: Policy | None, param: torch.Tensor, record: ParamRecord, rows: Runs | None
) -> dict[str, Any]:
    """A saved state with the rows that ours has. A file has those of its own mask, or all if it was saved sharded."""
    saved_rows: Runs | None = None
    if is_dtensor(param) or record.flat:
        return state
    if saved_policy is not None and (own := saved_policy.rows_of(record.name)):
        with contextlib.suppress(ValueError):  # of another number of rows
            saved_rows = own.runs(param.shape[0]) if own.parts else ()
    state = dict(state)
    for key, value in state.items():
        if key not in STATE_TENSORS or not isinstance(value, torch.Tensor):
            continue
        # The rows are compared, not only their number: the moments of others would be taken for those of ours.
        if saved_rows not in (None, rows) and tuple(value.shape) == state_shape(param, saved_rows):
            whole = param.detach().to(value) if key == "master_param" else value.new_zeros(param.shape)
            for part, (start, stop) in zip(value.split([stop - start for start, stop in saved_rows]), saved_rows):
                whole[start:stop] = part
            value = whole
        if value.shape == param.shape:
            state[key] = in_rows(value, rows)
    return state


def _check_saved_state(index: int, state: dict[str, Any] | None, param: torch.Tensor, rows: Runs | None) -> None:
    if not state:
        return
    own_shape = state_shape(param, rows)
    dropped = set(state) <= {"step", "master_param"}  # the moments of a block without a turn
    for key in ("step",) if dropped else ("step", "exp_avg", "exp_avg_sq"):
        if key not in state:
            raise ValueError(
                f"the state dict has no {key!r} for a parameter of group {index}: "
                "it is another kind of optimizer's, not AdamW's"
            )
    for key in STATE_TENSORS:
        shape = tuple(getattr(state[key], "shape", ("no tensor",))) if key in state else own_shape
        if shape != own_shape:
            raise ValueError(
                f"{key} in the state dict has shape {shape} where that of a parameter of group {index} has "
                f"{own_shape}: the state dict is of another model, or its parameters are in another order (named "
                "parameters are matched by name), or it was saved unsharded under TrainRows, with trained rows only"
            )


def _in_our_groups(
    saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]], strict: bool
) -> list[dict[str, Any]]:
    """The saved groups in the order of ours, each with its saved parameter ids in the order of our parameters.

    Without names the order is the file's. So it is where ids are names themselves, as torch.distributed.checkpoint has
    ordered them. Without ``strict`` one of our groups may be part of a saved one, or be made of several.
    """
    ids_are_names = any(isinstance(saved_id, str) for saved in saved_groups for saved_id in saved["params"])
    if ids_are_names or not all("param_names" in group for group in (*saved_groups, *groups)):
        if len(saved_groups) != len(groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} parameter groups, this optimizer has {len(groups)}, and "
                "parameters without names cannot be regrouped: make the groups of the saved run"
            )
        return saved_groups
    theirs, ours = map(_names, (saved_groups, groups))
    if theirs == ours:  # also where two parameters have one name
        return saved_groups
    place = {
        name: (number, saved_id)
        for number, (saved, names) in enumerate(zip(saved_groups, theirs))
        for name, saved_id in zip(names, saved["params"])
    }
    sources = [sorted({place[name][0] for name in names if name in place}) for names in ours]
    same = place.keys() == set(chain.from_iterable(ours))
    if not same or (strict and sorted(sources) != [[number] for number in range(len(saved_groups))]):
        _refuse(theirs, ours, "; the parameters are the same ones: strict=False regroups them" if same else "")
    return [
        {**_agreed([saved_groups[number] for number in numbers]), "params": [place[name][1] for name in names]}
        for numbers, names in zip(sources, ours)
    ]


def _names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[canonical_name(name) for name in group["param_names"]] for group in groups]


def _agreed(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What all of these groups say."""
    first, others = (groups[0], groups[1:]) if groups else ({}, [])
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _refuse(theirs: list[list[str]], ours: list[list[str]], remedy: str) -> NoReturn:
    if len(theirs) != len(ours):
        raise ValueError(f"the state dict has {len(theirs)} parameter groups, this optimizer has {len(ours)}{remedy}")
    pairs = [(set(its), set(own)) for its, own in zip(theirs, ours)]
    index, (its, own) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
    missing, extra = sorted(own - its)[:3], sorted(its - own)[:3]
    raise ValueError(
        f"parameter group {index} of the state dict is of other parameters: "
        f"it lacks {missing or 'none of ours'}, it has {extra or 'none'} besides{remedy}"
    )


def make_own(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Copies what torch has left shared with the file, so that it can be loaded again. Undoes torch's cast, to the
    parameter's dtype, of float32 moments and masters, and of moments in the dtype that the group wants. Makes step
    counts float32, in which the kernels count. Removes masters where none are wanted.

    Moments of any other dtype come from a model of that dtype, and for them the cast is right.
    """
    ids = (saved for group in state_dict["param_groups"] for saved in group["params"])
    rows = ((group, param) for group in optimizer.param_groups for param in group["params"])
    saved_states = dict(state_dict["state"])
    for saved, (group, param) in zip(ids, rows):
        own = optimizer.state[param] if saved in saved_states else {}
        for key, value in saved_states.pop(saved, {}).items():
            if key == "step":
                own[key] = torch.as_tensor(value, dtype=torch.float32, device=param.device).clone()
            elif not isinstance(value, torch.Tensor):
                own[key] = copy.deepcopy(value)
            elif value.dtype != own[key].dtype and value.dtype in (torch.float32, wanted_moments(param, group)):
                own[key] = value.to(param.device, copy=True)
            elif own[key] is value:
                own[key] = value.clone()
        if not has_master(param, group):
            own.pop("master_param", None)
    for key, value in saved_states.items():  # of no parameter
        optimizer.state[key] = copy.deepcopy(value)
