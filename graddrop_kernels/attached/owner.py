"""AttachedOwner: an optimizer of any class, as Masking and SkipDropped see it."""

import weakref
from typing import Any

import torch


class AttachedOwner:
    """A groups.owner.Owner whose groups are those of the optimizer, and whose state is the parameters' step counts."""

    max_grad_norm = grad_norm = None
    norm_after_mask = False

    def __init__(self, optimizer: torch.optim.Optimizer, backend: str) -> None:
        # A weak reference: the optimizer's hooks hold this, and a circle would keep moments until garbage is collected.
        self._optimizer = weakref.ref(optimizer)
        self.backend = backend
        self.defaults: dict[str, Any] = {"differentiable": False}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer that this mask was attached to is gone")
        return optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """{parameter: {"step": its completed steps}} of those that have made one."""
        return {
            param: {"step": steps}
            for group in self.param_groups
            for param, steps in zip(group["params"], group.get("param_steps", ()))
            if steps
        }
