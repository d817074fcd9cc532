"""Options of a parameter group: our keys beside torch's, and the values that are allowed."""

import math
from typing import Any

import torch

from ..policies import GradDrop

# Kept in every parameter group beside torch's keys, as plain values, so that any checkpoint format carries them.
GROUP_DEFAULTS = {
    "mask": GradDrop().to_json(),  # the policy as one canonical JSON string, or None
    "seed": 0,
    "masked": None,  # the policy's own; or one of MASKED
    "bias_correction": "active",  # or "global"
    "cautious_weight_decay": False,  # no decay where the update moves a weight away from 0
    "moment_dtype": None,  # None: the parameter's; "float32" of 16-bit ones, "bfloat16" of float32 ones
    "master_weights": False,  # step a float32 copy of 16-bit parameters
    "stochastic_rounding": False,  # of bfloat16 parameters
    "stochastic_moments": False,  # rounding of bfloat16 moments
    "max_grad_norm": None,  # this and the next: of the whole optimizer, the same in all groups
    "norm_after_mask": False,
    "epoch": 0,
    "epoch_was_set": False,  # set_epoch() was called at least once
    "completed_steps": 0,  # steps that this group has made; the draw of its block masks
    "epoch_history": "",  # "epoch:first step,...", see policies.clock
}
MASKED = ("gradient", "frozen", "update")
# What all groups share, so that a new one takes it from the others.
SHARED_BY_GROUPS = ("epoch", "epoch_was_set", "max_grad_norm", "norm_after_mask")


def draws(group: dict[str, Any]) -> bool:
    """Whether the steps of a group draw random numbers, for masks or for rounding. A group that a mask is attached to
    has no options of rounding.
    """
    return group["mask"] is not None or group.get("stochastic_rounding") or group.get("stochastic_moments") or False


def moment_dtype_name(dtype: torch.dtype | str | None) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and (name not in ("float32", "bfloat16") or not isinstance(dtype, (torch.dtype, str))):
        raise ValueError(
            f"moment_dtype must be None (the parameter's dtype), torch.float32 or torch.bfloat16, got {dtype!r}"
        )
    return None if dtype is None else name


def _number(name: str, where: str, value: Any) -> float:
    """The value as a float. Raises ValueError for anything else: a string, None, a tensor of several elements.

    An lr or weight decay on a GPU counts as 0, so that the host does not wait for its value.
    """
    if name in ("lr", "weight_decay") and isinstance(value, torch.Tensor) and value.is_cuda and value.numel() == 1:
        return 0.0
    try:
        value = value.detach() if isinstance(value, torch.Tensor) else value
        return float("a string" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}{where} must be a number, got {value!r}") from None


def check_at_least_0(name: str, value: Any, where: str = "") -> None:
    """Raises ValueError unless the value is a finite number >= 0. NaN fails the comparison. ``where``: of which group.
    """
    if not 0 <= _number(name, where, value) < math.inf:
        raise ValueError(f"{name}{where} must be a finite number >= 0, got {value!r}")


def check_seed(index: int, seed: Any) -> None:
    """Raises ValueError for anything but a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed of parameter group {index} must be an int in [0, 2^64), got {seed!r}")


def check_options(index: int, group: dict[str, Any]) -> None:
    """Raises a ValueError that names the group's offending value. Comparisons are written so that NaN fails them."""
    where = f" of parameter group {index}"
    for name in ("lr", "eps", "weight_decay"):
        check_at_least_0(name, group[name], where)
    if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
        raise ValueError(f"betas of parameter group {index} must be two numbers in [0, 1), got {group['betas']!r}")
    betas = [_number("betas", where, beta) for beta in group["betas"]]
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas of parameter group {index} must be in [0, 1), got {group['betas']!r}")
    if not all(beta < 1 - 2**-25 for beta in betas):
        raise ValueError(
            f"betas of parameter group {index} must not round to 1 in float32, where moments would stand still; "
            f"the largest usable is {1 - 2**-24:.10g}, got {group['betas']!r}"
        )
    if group["capturable"] and not all(param.is_cuda for param in group["params"]):
        raise ValueError(
            f"capturable=True needs parameters on a GPU; leave it False (parameter group {index})"
        )
    for name in ("cautious_weight_decay", "master_weights", "stochastic_rounding", "stochastic_moments"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} of parameter group {index} must be True or False, got {group[name]!r}")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError(
            f"master_weights and stochastic_rounding of parameter group {index} exclude each other: the rounding of "
            "master weights is not lost; leave one False"
        )
    check_seed(index, group["seed"])
    if group["masked"] not in (None, *MASKED):
        raise ValueError(
            f"masked of parameter group {index} must be one of {MASKED} or None, got {group['masked']!r}"
        )
    if group["bias_correction"] not in ("active", "global"):
        raise ValueError(
            f"bias_correction of parameter group {index} must be 'active' or 'global', got {group['bias_correction']!r}"
        )


def check_epoch(epoch: Any) -> None:
    """Raises ValueError for anything but the number of an epoch."""
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"set_epoch(epoch) needs the number of the epoch, an int >= 0, got {epoch!r}")


def check_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """Returns the limit. Raises ValueError for one that cannot be used. NaN fails the comparison."""
    if max_grad_norm is None:
        return None
    if isinstance(max_grad_norm, (bool, str)) or not 0 < max_grad_norm <= math.inf:
        raise ValueError(f"max_grad_norm must be a number > 0, or None for no clipping, got {max_grad_norm!r}")
    return max_grad_norm


def check_clipping(groups: list[dict[str, Any]], first: int = 0) -> None:
    """Raises ValueError for a limit that cannot be used, or one that the groups do not share. Groups before the one of
    index ``first`` have been checked before.
    """
    for index, group in list(enumerate(groups))[first:]:
        for name in ("max_grad_norm", "norm_after_mask"):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{name}={group[name]!r} of parameter group {index} must be that of group 0, {groups[0][name]!r}: "
                    f"the norm is of the gradients of all groups together; set optimizer.{name}, or it in every group"
                )
    if groups:
        check_max_grad_norm(groups[0]["max_grad_norm"])
