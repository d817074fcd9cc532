"""Stepper: makes a step of parameters and gradients. It checks, prepares, plans, clips, updates and counts."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ..backends.capture import capturing
from ..groups.checks import check_written_grads
from ..groups.masking import Masking
from ..groups.options import check_clipping, check_options
from ..groups.owner import Owner
from ..policies import Clock, Policy
from ..tensors.local import local_grads, local_tensors
from .clip import clip_
from .prepare import prepare, prepared_for
from .prepared import PreparedStep, picker
from .streams import Streams
from .warn_once import WarnOnce


class Stepper:
    """Steps one optimizer. Between two steps it keeps the prepared step, and counts that only the device knows yet."""

    def __init__(self, owner: Owner, masking: Masking) -> None:
        self._owner_alive = weakref.ref(owner)
        self.owner: Owner = weakref.proxy(owner)  # a strong reference would keep its moments alive, see Masking
        self.masking = masking
        self.warn = WarnOnce()
        self.streams = Streams()
        self.prepared: PreparedStep | None = None
        self.captured: PreparedStep | None = None  # by a CUDA graph, which holds the addresses of these:
        self._captured_tensors: list[torch.Tensor] = []
        self.voided: dict[int, torch.Tensor] = {}  # per group index, the number of steps that a GradScaler made no-ops

    @property
    def is_orphan(self) -> bool:
        """Whether its optimizer is gone."""
        return self._owner_alive() is None

    def step(
        self, params: list[torch.Tensor], grads: list[torch.Tensor | None], grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None, fresh: Callable[[], bool], stepped: Callable[[], set[int]] = set,
    ) -> None:  # fmt: skip
        """Makes one step of all parameters.

        Args:
            params: the parameters of all groups, in order.
            grads: the gradient of each parameter; None leaves the parameter out.
            grad_scale, found_inf: as a GradScaler has put them on the optimizer.
            fresh: returns whether there was no step before this one.
            stepped: returns the groups that have been stepped before this call, in the backward pass. Called once, at
                the end.

        Raises before anything has changed.
        """
        # Check.
        self.check()
        self.settle(only_if_needed=True)
        there = [position for position, grad in enumerate(grads) if grad is not None]
        given: list[Any] = grads
        if len(there) < len(grads):
            pick = picker(there)
            params, given = pick(params), pick(grads)
        given = local_grads(params, given)
        if grad_scale is not None:
            check_written_grads(self.masking, params, given)
        # Prepare: batches of rows, good for the next step too as long as no tensor moves.
        prepared, made_for = self.prepared, prepared_for(self.owner, self.masking)
        tensors = local_tensors(params)
        if prepared is None or prepared.made_for != made_for:
            self.streams.hold(self.masking.drawn_streams())
        if prepared is None or not prepared.holds(there, params, tensors, given, self.owner.state, made_for):
            prepared = self.prepared = prepare(
                self.owner, self.masking, self.warn, there, params, given, fresh, made_for, prepared
            )
            if prepared is None:
                return  # the call only asked for the state
        grad_scale, found_inf = _as_float32(grad_scale), _as_float32(found_inf)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        # Plan, clip, update.
        clocks = self.masking.clocks()
        self.run(prepared, tensors, given, self.owner.state, clocks, grad_scale, found_inf)
        if any(capturing(part.batch.device) for part in prepared.parts):
            self.captured, self._captured_tensors = prepared, prepared.addressed_tensors(tensors, self.owner.state)
            return  # a capture runs nothing
        # Count.
        self.warn(self.streams.warning_of_step())
        elsewhere = set(filter(self.masking.buffers.has_gradients, self.masking.indices()))
        self.count(prepared.group_indices | stepped() | elsewhere, clocks, found_inf)

    def run(
        self, prepared: PreparedStep, tensors: list[torch.Tensor], grads: list[torch.Tensor],
        state: Mapping[torch.Tensor, Any], clocks: list[Clock], grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Masks and updates the prepared parameters. Counts only the parameters' own steps.

        Args:
            tensors, grads: the local tensors of the parameters that have gradients, and those.
        """
        owner, parts = self.owner, prepared.parts
        try:
            prepared.take(tensors, grads, state)
            for part in parts:
                batch = part.batch
                batch.hypers = [self.masking.hyper(index, unit, clocks[index]) for index, unit in part.plans_of]
                batch.clip_factor = None
                batch.grad_scale, batch.found_inf = (
                    scalar if scalar is None else scalar.to(batch.device, non_blocking=True)
                    for scalar in (grad_scale, found_inf)
                )
            if owner.max_grad_norm is not None and parts:
                owner.grad_norm = clip_(parts, owner.max_grad_norm, owner.norm_after_mask, grad_scale)
            for part in parts:
                part.batch.step_with(part.backend.masked_adamw_)
            if grad_scale is not None:
                prepared.write_grads_back()
            increment_version(prepared.written(tensors, state))
        finally:
            prepared.release()

    def count(self, indices: set[int], clocks: list[Clock], found_inf: torch.Tensor | None) -> None:
        """Counts the step that these groups have made."""
        for index in indices:
            group, clock = self.owner.param_groups[index], clocks[index]
            if not self.masking.buffers.completes_step(group):
                continue
            if not clock.history or clock.history[-1][0] != clock.epoch:
                group["epoch_history"] = clock.with_this_step((self.masking.policy(index) or Policy()).fold)
            group["completed_steps"] += 1
            if found_inf is not None:
                self.voided[index] = self.voided.get(index, 0) + (found_inf != 0).to(torch.int64)

    def settle(self, only_if_needed: bool = False) -> None:
        """Subtracts the steps that a GradScaler made no-ops from the groups' counts.

        Only the device knows their number, and reading it makes the host wait. So this is called only before the counts
        are read; with ``only_if_needed`` it does nothing unless the masks of some group depend on the counts.
        """
        if not self.voided:
            return
        if only_if_needed and not any(map(self.masking.counts_steps, self.masking.indices())):
            return
        for index, voided in self.voided.items():
            self.owner.param_groups[index]["completed_steps"] -= int(voided)
        self.voided.clear()

    def advance_captured(self) -> None:
        """See FusedGradDropAdamW.advance_captured_step()."""
        if self.captured is None:
            raise RuntimeError("advance_captured_step() needs a step() that was captured in a CUDA graph")
        self.check()
        clocks = self.masking.clocks()
        for part in self.captured.parts:
            hypers = [self.masking.hyper(index, unit, clocks[index]) for index, unit in part.plans_of]
            part.batch.refresh_captured(hypers)
        self.count(self.captured.group_indices, clocks, None)

    def check(self) -> None:
        """Raises ValueError for options that no step could use."""
        owner = self.owner
        differentiable: Any = owner.defaults["differentiable"]
        for index, group in enumerate(owner.param_groups):
            check_options(index, group)
            if group["differentiable"] != differentiable:
                raise ValueError(
                    f"differentiable of parameter group {index} is {group['differentiable']!r}, the optimizer's is "
                    f"{differentiable!r}: choose it for all groups when the optimizer is made"
                )
        check_clipping(owner.param_groups)

    def forget(self) -> None:
        """Drops everything that was derived from the groups. Call it after a load or a new group."""
        self.masking.forget()
        self.prepared = None

    def reloaded(self) -> None:
        """Drops what belonged to the groups' earlier values. Call it when a checkpoint has been loaded into them."""
        self.forget()
        self.voided.clear()


def _as_float32(scalar: torch.Tensor | float | None) -> torch.Tensor | None:
    """A number of a GradScaler as a tensor. It leaves the int 0 in place of a tensor if no gradient came."""
    if scalar is None or isinstance(scalar, torch.Tensor):
        return scalar if scalar is None else scalar.to(torch.float32)
    return torch.tensor(scalar, dtype=torch.float32, device="cpu")
