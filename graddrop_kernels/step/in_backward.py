"""StepInBackward: steps parameters in the backward pass and frees their gradients one by one."""

from typing import Any

import torch

from ..backends import capture
from ..tensors.local import local_grads, local_tensors, several_processes
from .idle_state import drop_gradient
from .prepare import prepare, prepared_for
from .prepared import PreparedStep
from .stepper import Stepper

_CAPTURED = (
    "a CUDA graph is being captured, and steps in the backward pass plan and count on the host, which replays do not "
    "run: remove() the handle of step_in_backward() before the capture, and capture optimizer.step()"
)


class StepInBackward:
    """Steps each parameter of an optimizer as soon as its gradient is complete, then frees the gradient, so that the
    gradients of a model are never all there at once. Masks and results are those of a normal step.

    ``optimizer.step()`` stays where it was in the loop. It steps every parameter that still has a gradient, then ends
    and counts the step. ``remove()`` goes back to normal.

    Everything that needs all gradients at once is refused: accumulation over several backward passes,
    ``max_grad_norm``, and a GradScaler (``fused=True``). More than one process is refused too, since the hook may run
    before the gradients are averaged.

    Raises:
        ValueError, RuntimeError: one of these is in use; the message names the remedy. Accumulation is noticed only in
            the backward pass.

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

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper  # refers to its optimizer weakly: the parameters hold the hooks, and those hold self
        self._hooks: list[Any] | None = None  # None: off
        self._prepared: dict[int, PreparedStep] = {}  # by the id of a parameter
        self._clocks: list[Any] = []  # of the step that is under way, as the next
        self._made_for: Any = None
        self._done: dict[torch.Tensor, int] = {}  # parameters stepped in it, and their groups

    def start(self) -> "StepInBackward":
        """Begins with the next backward pass."""
        if self.is_on:
            raise RuntimeError("step_in_backward() is on already; remove() the handle of the first call before another")
        self._check()
        self.check_not_captured()
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._step_one)
            for group in self._stepper.owner.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        return self

    @property
    def is_on(self) -> bool:
        return self._hooks is not None

    @property
    def under_way(self) -> bool:
        """Whether parameters have been stepped for a step that ``optimizer.step()`` has not ended yet."""
        return bool(self._done)

    def check_ended(self, what: str) -> None:
        """Raises RuntimeError while some parameters have made a step that others have not."""
        if self.under_way:
            raise RuntimeError(
                f"{what} between backward() and optimizer.step(): with step_in_backward() some parameters have made "
                "this step already and others have not; call optimizer.step() first"
            )

    def check_not_captured(self) -> None:
        """Raises RuntimeError inside of the capture of a CUDA graph, whose replays would run no hook and count nothing.
        """
        params = (param for group in self._stepper.owner.param_groups for param in group["params"])
        if any(map(capture.capturing, {param.device for param in params})):
            raise RuntimeError(_CAPTURED)

    def remove(self) -> None:
        """Goes back to normal steps. ``optimizer.step()`` must have ended a step that was under way."""
        self.check_ended("remove()")
        for hook in self._hooks or ():
            hook.remove()
        self._hooks, self._prepared = None, {}

    def finish(self) -> set[int]:
        """Ends the step under way; returns the groups that have stepped in it."""
        indices = set(self._done.values())
        self._done = {}
        return indices

    def _check(self) -> None:
        owner = self._stepper.owner
        if owner.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={owner.max_grad_norm!r} needs all gradients before the first is used; "
                "set it to None, or do not step in the backward pass"
            )
        if any(group["fused"] for group in owner.param_groups):
            raise ValueError(
                "fused=True lets a GradScaler look for infinities in all gradients before a step: "
                "leave fused=None, and do not use a GradScaler with steps in the backward pass"
            )
        if several_processes():
            raise RuntimeError(
                "steps in the backward pass would use gradients that DDP and FSDP have not averaged yet; "
                "with more than one process call optimizer.step() after backward() instead"
            )

    @torch.no_grad()
    def _step_one(self, param: torch.Tensor) -> None:
        stepper = self._stepper
        if stepper.is_orphan:
            return  # nobody is left to step it: the gradient stays
        if param.grad is None:
            return  # another hook has taken it
        if param in self._done:
            raise RuntimeError(
                "a second gradient for a parameter that has been stepped already: with step_in_backward() call "
                "optimizer.step() after every backward(); gradients cannot be accumulated, they are gone"
            )
        if capture.capturing(param.device):
            raise RuntimeError(_CAPTURED)
        owner, masking, prepared = stepper.owner, stepper.masking, self._prepared.get(id(param))
        if not self.under_way:  # what takes time per group, once per step
            self._check()
            stepper.check()
            self._clocks, self._made_for = masking.clocks(), prepared_for(owner, masking)
        idle = drop_gradient(owner, masking, param, self._clocks)
        if idle is not None:
            self._done[param] = idle
            return
        grads, tensors = local_grads([param], [param.grad]), local_tensors([param])
        state = {param: owner.state[param]}
        if prepared is None or not prepared.holds([0], [param], tensors, grads, state, self._made_for):
            prepared = prepare(owner, masking, stepper.warn, [0], [param], grads, None, self._made_for, prepared)
            if prepared is None:  # a fake tensor
                param.grad = None
                return
            self._prepared[id(param)] = prepared
        stepper.run(prepared, tensors, grads, state, self._clocks)
        self._done |= dict.fromkeys([param], *prepared.group_indices)
        param.grad = None
