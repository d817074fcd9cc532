"""What attach_mask refuses, with the reason and what to use instead."""

from typing import Any

import torch

from ..policies import Policy, TrainRows

_FROZEN = "stays as it is, so the mask must act inside of the optimizer's step, which only FusedGradDropAdamW has"
_FLAT = ("deepspeed.runtime.", "apex.contrib.", "megatron.")  # modules whose optimizers step flat tensors
_BEFORE = "attach the mask before deepspeed.initialize(), and call attach_deepspeed(engine) after it"


def check_policy(index: int, policy: Policy | None, masked: str | None) -> None:
    """Raises ValueError for a mask that cannot act from outside of an optimizer's step."""
    if policy is None:
        return
    name = type(policy).__name__
    meaning = masked or policy.masked
    if meaning not in (None, "gradient", "frozen"):  # also by the policy's own choice
        raise ValueError(
            f"masked={meaning!r} of parameter group {index}: attach_mask knows 'gradient' and, for policies of whole "
            "blocks, 'frozen'; use FusedGradDropAdamW for others"
        )
    if masked is not None and policy.masked is None:
        raise ValueError(f"masked={masked!r} does not apply to {name}, which drops nothing; leave it None")
    if isinstance(policy, TrainRows):
        raise ValueError(f"TrainRows: a row that is not trained {_FROZEN}; use that")
    if meaning not in (None, "gradient") and not policy.needs_blocks:
        raise ValueError(f"{name} with masked={meaning!r}: a dropped element {_FROZEN}; use that, or masked='gradient'")
    if getattr(policy, "idle_state", "keep") == "drop":
        raise ValueError(
            f"idle_state='drop' of {name} would free moments that only the optimizer knows: use idle_state='keep', or "
            "FusedGradDropAdamW"
        )


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer to attach a mask to, out of a wrapper that steps it. Raises TypeError or ValueError for one that
    cannot be masked.
    """
    given, outer = optimizer, optimizer
    while optimizer is not None:  # Accelerate's and Lightning's wrappers, which call the step of the one inside
        if (module := f"{type(optimizer).__module__}.").startswith(_FLAT):
            raise ValueError(
                f"{type(optimizer).__name__} of {module.partition('.')[0]} steps flat tensors, of which attach_mask "
                f"does not know what they hold: under DeepSpeed {_BEFORE}"
            )
        outer, optimizer = optimizer, getattr(optimizer, "optimizer", None)
    optimizer = outer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"attach_mask(optimizer) needs a torch.optim.Optimizer, got {type(given).__name__}")
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if hasattr(type(optimizer), "masking"):
        raise TypeError(
            "attach_mask(optimizer) is for other optimizers: FusedGradDropAdamW masks inside of its step, at no cost; "
            "give it mask="
        )
    if "LBFGS" in kinds:
        raise ValueError(
            "LBFGS computes gradients several times in a step and compares them, and masked ones are not those of one "
            "loss; use an optimizer with one gradient per step"
        )
    if "ZeroRedundancyOptimizer" in kinds:
        raise ValueError(
            "ZeroRedundancyOptimizer divides the parameters among processes: use optimizer_class=FusedGradDropAdamW "
            "and attach_zero(), or fully_shard with any optimizer"
        )
    return optimizer
