"""Owner: the attributes of an optimizer that lower packages may read, all of them public."""

from collections import defaultdict
from typing import Any, Protocol

import torch


class Owner(Protocol):
    """FusedGradDropAdamW as its step and the inspection see it. A compiled step may have an Owner of its own."""

    param_groups: list[dict[str, Any]]  # the truth: options, policy as JSON, epoch, completed steps
    state: defaultdict[torch.Tensor, Any]
    defaults: dict[str, Any]
    backend: str  # as the user named it
    max_grad_norm: float | None
    norm_after_mask: bool
    grad_norm: torch.Tensor | None  # of the last step
