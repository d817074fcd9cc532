"""StepInBackward: parameters are stepped in the backward pass, and their gradients freed one by one."""

import weakref
from typing import TYPE_CHECKING, Any

import torch

from ..tensors.local import local_grads, local_tensors
from .prepare import prepare
from .prepared import PreparedStep

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW


class StepInBackward:
    """Steps each parameter of an optimizer as soon as its gradient is complete, then frees the gradient, so that the
    gradients of a model are never all there at once. Masks and results are those of a normal step.

    ``optimizer.step()`` stays where it was in the loop: it ends the step, counts it, and steps what has a gradient
    still. ``remove()`` goes back to normal.

    What needs all gradients at once is refused: accumulation over several backward passes, ``max_grad_norm``, a
    GradScaler (``fused=True``), and more than one process, where the hook may run before the gradients are averaged.

    Raises:
        ValueError, RuntimeError: one of these, with the remedy. Accumulation shows in the backward pass only.

    Example:
        >>> import torch
        >>> from graddrop_kernels import FusedGradDropAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FusedGradDropAdamW(model.named_parameters(), lr=2e-5)
        >>> handle = optimizer.step_in_backward()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> handle.remove()
    """

    def __init__(self, optimizer: "FusedGradDropAdamW") -> None:
        if optimizer._in_backward is not None:
            raise RuntimeError("step_in_backward() is on already; remove() the handle of the first call before another")
        self._optimizer = weakref.ref(optimizer)  # the parameters hold the hooks, and they this
        self._check(optimizer)
        self._prepared: dict[torch.Tensor, PreparedStep] = {}
        self._clocks: list[Any] | None = None  # of the step that is under way
        self._done: dict[torch.Tensor, int] = {}  # parameters stepped in it, and their groups
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._step_one)
            for group in optimizer.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        optimizer._in_backward = self

    @property
    def under_way(self) -> bool:
        """Whether parameters have been stepped for a step that ``optimizer.step()`` has not ended yet."""
        return bool(self._done)

    def remove(self) -> None:
        """Ends it; a step under way must have been ended by ``optimizer.step()``."""
        if self.under_way:
            raise RuntimeError("a step is under way: call optimizer.step() after backward(), then remove()")
        for hook in self._hooks:
            hook.remove()
        if (optimizer := self._optimizer()) is not None:
            optimizer._in_backward = None

    def finish(self) -> set[int]:
        """Ends the step under way; returns the groups that have stepped in it."""
        indices = set(self._done.values())
        self._done, self._clocks = {}, None
        return indices

    @staticmethod
    def _check(optimizer: "FusedGradDropAdamW") -> None:
        if optimizer.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={optimizer.max_grad_norm!r} needs all gradients before the first is used; "
                "set it to None, or do not step in the backward pass"
            )
        if any(group["fused"] for group in optimizer.param_groups):
            raise ValueError(
                "fused=True lets a GradScaler look for infinities in all gradients before a step: "
                "leave fused=None, and do not use a GradScaler with steps in the backward pass"
            )
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError(
                "steps in the backward pass would use gradients that DDP and FSDP have not averaged yet; "
                "with more than one process call optimizer.step() after backward() instead"
            )

    @torch.no_grad()
    def _step_one(self, param: torch.Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return  # nobody is left to step it: the gradient stays
        if param in self._done:
            raise RuntimeError(
                "a second gradient for a parameter that has been stepped already: with step_in_backward() call "
                "optimizer.step() after every backward(); gradients cannot be accumulated, they are gone"
            )
        self._check(optimizer)
        optimizer._check_options()
        groups, prepared = optimizer._groups, self._prepared.get(param)
        grads, state = local_grads([param], [param.grad]), {param: optimizer.state[param]}
        if prepared is None or not prepared.holds(local_tensors([param]), grads, state, optimizer._facts()):
            prepared = prepare(optimizer, [param], grads, fresh=None)
            assert prepared is not None  # with fresh=None it is a step, never a question
            self._prepared[param] = prepared
        if self._clocks is None:
            self._clocks = list(map(groups.clock, groups.indices()))
        optimizer._run(prepared, grads, self._clocks)
        self._done |= dict.fromkeys([param], *prepared.group_indices)
        param.grad = None
