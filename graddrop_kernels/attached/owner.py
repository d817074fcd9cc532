"""AttachedOwner: an optimizer of any class, as Masking and SkipDropped see it."""

import weakref
from operator import is_
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
        self._made_from: list[Any] = []
        self._state: dict[torch.Tensor, dict[str, int]] = {}

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
        lists = [each for group in self.param_groups for each in (group["params"], group.get("param_steps", ()))]
        if len(lists) != len(self._made_from) or not all(map(is_, lists, self._made_from)):  # a step replaces them
            pairs = (pair for params, steps in zip(lists[::2], lists[1::2]) for pair in zip(params, steps))
            self._state = {param: {"step": steps} for param, steps in pairs if steps}
            self._made_from = lists
        return self._state
