"""Finds our optimizer in a training loop's wrappers, and describes what its masks do."""

from dataclasses import replace
from typing import Any

from ..attached.handle import AttachedMask, attached_to
from ..optimizer import FusedGradDropAdamW
from ..policies import Clock

Masked = FusedGradDropAdamW | AttachedMask  # what sets the epoch, and tells of the masks


def unwrapped(optimizer: Any) -> Masked | None:
    """Returns the FusedGradDropAdamW in a wrapper (Accelerate's, DeepSpeed's, one in the other), or the mask that
    ``attach_mask`` has attached to another optimizer there; None if there is neither.
    """
    while optimizer is not None and not isinstance(optimizer, FusedGradDropAdamW):
        if (attached := attached_to(optimizer)) is not None:
            return attached
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def active_blocks(optimizer: Masked) -> list[str]:
    """Returns the blocks that had their turn in the last step, in forward order; [] if none take turns. Before the
    first step, those of that one.
    """
    masking = optimizer.masking
    return list(dict.fromkeys(
        block
        for index in masking.indices()
        if (policy := masking.policy(index)) is not None and policy.takes_turns
        for block in masking.blocks(index)
        if masking.plan(index, block, _before(masking.clock(index))).kind != "off"
    ))  # fmt: skip


def _before(clock: Clock) -> Clock:
    """The time of the step before."""
    return replace(clock, completed_steps=max(clock.completed_steps - 1, 0))


def describe_masks(optimizer: Masked) -> dict[str, float]:
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
        last = _before(clock)
        numel = sum(param.numel() for param in group["params"])
        active, total = active + numel * masking.active_fraction(index, last), total + numel
        if hasattr(policy, "p"):
            found.setdefault("graddrop_p", float(policy.p(epoch) if callable(policy.p) else policy.p))
    if total:
        found["graddrop_active_fraction"] = active / total
    return found
