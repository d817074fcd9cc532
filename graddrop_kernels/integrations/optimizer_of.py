"""Finds our optimizer in a training loop's wrappers, and describes what its masks do."""

from dataclasses import replace
from typing import Any

from ..optimizer import FusedGradDropAdamW


def unwrapped(optimizer: Any) -> FusedGradDropAdamW | None:
    """Returns the FusedGradDropAdamW in a wrapper (Accelerate's, DeepSpeed's, one in the other); None if there is
    none.
    """
    while optimizer is not None and not isinstance(optimizer, FusedGradDropAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def describe_masks(optimizer: FusedGradDropAdamW) -> dict[str, float]:
    """Returns what a training log should show of the last step: epoch, share of active elements of the masked groups,
    p. Before the first step, it describes that one.
    """
    masking, epoch = optimizer.masking, optimizer.param_groups[0]["epoch"]
    found: dict[str, float] = {"graddrop_epoch": epoch}
    active, total = 0.0, 0
    for index, group in enumerate(optimizer.param_groups):
        policy, clock = masking.policy(index), masking.clock(index)
        if policy is None:
            continue
        last = replace(clock, completed_steps=max(clock.completed_steps - 1, 0))
        numel = sum(param.numel() for param in group["params"])
        active, total = active + numel * masking.active_fraction(index, last), total + numel
        if hasattr(policy, "p"):
            found.setdefault("graddrop_p", float(policy.p(epoch) if callable(policy.p) else policy.p))
    if total:
        found["graddrop_active_fraction"] = active / total
    return found
