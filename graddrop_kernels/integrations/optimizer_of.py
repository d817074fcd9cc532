"""What every training loop's callback asks of the optimizer it is given: which one it is, and what its masks do."""

from typing import Any

from ..optimizer import FusedGradDropAdamW


def unwrapped(optimizer: Any) -> FusedGradDropAdamW | None:
    """The FusedGradDropAdamW in a wrapper (Accelerate's, DeepSpeed's, one in the other); None if there is none."""
    while optimizer is not None and not isinstance(optimizer, FusedGradDropAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def describe_masks(optimizer: FusedGradDropAdamW) -> dict[str, float]:
    """What a training log should have: epoch, share of active elements of the masked groups, p."""
    shares = optimizer.active_fraction()
    masked = [
        (share, sum(param.numel() for param in group["params"]), optimizer._groups.policy(index))
        for index, (share, group) in enumerate(zip(shares, optimizer.param_groups))
        if group["mask"] is not None
    ]
    epoch = optimizer.param_groups[0]["epoch"]
    found = {"graddrop_epoch": epoch}
    total = sum(numel for _, numel, _ in masked)
    if total:
        found["graddrop_active_fraction"] = sum(share * numel for share, numel, _ in masked) / total
    rates = [policy.p for _, _, policy in masked if policy is not None and hasattr(policy, "p")]
    if rates:
        found["graddrop_p"] = float(rates[0](epoch) if callable(rates[0]) else rates[0])
    return found
