"""Stepper: makes a step of parameters and gradients. It checks, prepares, plans, clips, updates and counts."""

import weakref
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, cast

import torch
from torch.autograd.graph import increment_version

from ..backends import capture
from ..groups.checks import check_written_grads
from ..groups.masking import Masking
from ..groups.options import check_clipping, check_options
from ..groups.owner import Owner
from ..policies import Clock
from ..tensors.local import local_grads, local_tensors
from .captured import CapturedStep, check_capture
from .clip import clip_
from .idle_state import IdleBlocks
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
        self.captured: list[CapturedStep] = []  # by CUDA graphs that can still be replayed
        self._replaced: list[CapturedStep] = []  # by others, whose tables are kept as nobody knows when a graph is gone
        self._replayed_norm: torch.Tensor | None = None  # of the last replay of any of them
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
        clocks = self.masking.clocks()
        idle = IdleBlocks(self.owner, self.masking, clocks, grads)
        grads = idle.grads
        there = [position for position, grad in enumerate(grads) if grad is not None]
        keys, given = params, cast(list[torch.Tensor], grads)
        if len(there) < len(grads):
            pick = picker(there)
            keys, given = pick(params), pick(grads)
        given = local_grads(keys, given)
        if grad_scale is not None:
            check_written_grads(self.masking, keys, given)
        # Prepare: batches of rows, good for the next step too as long as no tensor moves.
        prepared, made_for = self.prepared, prepared_for(self.owner, self.masking)
        tensors = local_tensors(keys)
        holds = prepared is not None and prepared.holds(there, keys, tensors, given, self.owner.state, made_for)
        in_graph = self._check_capture(prepared if holds else None, tensors, grad_scale, found_inf)
        if in_graph and idle.any_group:
            raise RuntimeError(
                "a CUDA graph is being captured, and idle_state='drop' frees and makes moments between its replays: "
                "use idle_state='keep', or call step() outside of the graph"
            )
        if prepared is None or prepared.made_for != made_for:
            self.streams.hold(self.masking.drawn_streams())
        if not holds:
            prepared = self.prepared = prepare(
                self.owner, self.masking, self.warn, there, keys, given, fresh, made_for, prepared, idle.free
            )
        else:
            idle.free()
        if prepared is None:
            return  # the call only asked for the state
        grad_scale, found_inf = _as_float32(grad_scale), _as_float32(found_inf)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf != 0:
            return
        # Plan, clip, update.
        last_norm = self.owner.grad_norm
        try:
            self.run(prepared, tensors, given, self.owner.state, clocks, grad_scale, found_inf)
            if in_graph:
                self._keep(CapturedStep(self.owner, prepared, tensors, self.owner.state), params, made_for, clocks)
                return  # a capture runs nothing
        finally:
            if in_graph:
                self.owner.grad_norm = last_norm
        # Count.
        self._count(prepared.group_indices | idle.groups | stepped(), clocks, found_inf)

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

    def _count(self, indices: set[int], clocks: list[Clock], found_inf: torch.Tensor | None) -> None:
        """Counts the step that these groups have made, and those with gradients in other processes."""
        self.warn(self.streams.warning_of_step())
        elsewhere = set(filter(self.masking.buffers.has_gradients, self.masking.indices()))
        for index in indices | elsewhere:
            if not self.masking.buffers.completes_step(self.owner.param_groups[index]):
                continue
            self.masking.count_step(index, clocks[index])
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

    def _check_capture(
        self, prepared: PreparedStep | None, tensors: list[torch.Tensor], grad_scale: object, found_inf: object
    ) -> bool:
        """Whether the step is being captured. Raises RuntimeError if it cannot be. ``prepared``: None if it is no good.
        """
        if prepared is not None:
            devices = {part.batch.device for part in prepared.parts}
        else:
            devices = {tensor.device for tensor in tensors}
        in_graph = any(map(capture.capturing, devices))
        if in_graph:
            check_capture(prepared, devices, with_scaler=grad_scale is not None or found_inf is not None)
        return in_graph

    def _keep(self, new: CapturedStep, params: list[torch.Tensor], made_for: object, clocks: list[Clock]) -> None:
        """Keeps a step that was captured beside those that still are the same step, for example on other gradients."""
        for each in self._replaced:
            each.release()
        still = [
            each.group_indices == new.group_indices
            and each.plan(self.owner, self.masking, params, made_for, clocks) is None
            for each in self.captured
        ]
        self._replaced += [each for each, good in zip(self.captured, still) if not good]
        self.captured = [*compress(self.captured, still), new]
        norm = self.owner.grad_norm
        if norm is None or self.owner.max_grad_norm is None:
            return
        if self._replayed_norm is None or len(self.captured) == 1:
            self._replayed_norm = norm
        else:
            self._replayed_norm.copy_(norm)  # in the graph

    def advance_captured(self) -> None:
        """See FusedGradDropAdamW.advance_captured_step()."""
        if not self.captured:
            raise RuntimeError(
                "advance_captured_step() needs a step() that was captured in a CUDA graph"
                + (", and since then the optimizer was loaded or changed: capture it again" if self._replaced else "")
            )
        if any(capture.capturing(device) for each in self.captured for device in each.devices):
            raise RuntimeError(
                "advance_captured_step() inside of a capture: its numbers would be those of one step in every replay; "
                "call it outside of the graph, right before each replay"
            )
        self.check()
        self.settle(only_if_needed=True)
        clocks, made_for = self.masking.clocks(), prepared_for(self.owner, self.masking)
        params = [param for group in self.owner.param_groups for param in group["params"]]
        for each in self.captured:
            if reason := each.plan(self.owner, self.masking, params, made_for, clocks):
                raise RuntimeError(
                    f"the step that was captured cannot carry out this one: {reason}; capture it again, after one "
                    "step() outside of the graph"
                )
        for each in self.captured:
            each.refresh()
        if self.owner.max_grad_norm is not None:
            self.owner.grad_norm = self._replayed_norm
        self._count(self.captured[-1].group_indices, clocks, None)

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
        self.retire_captured()

    def retire_captured(self) -> None:
        """Lets no graph be replayed any more. What they hold stays until another is captured."""
        self._replaced, self.captured = self._replaced + self.captured, []


def _as_float32(scalar: torch.Tensor | float | None) -> torch.Tensor | None:
    """A number of a GradScaler as a tensor. It leaves the int 0 in place of a tensor if no gradient came."""
    if scalar is None or isinstance(scalar, torch.Tensor):
        return scalar if scalar is None else scalar.to(torch.float32)
    return torch.tensor(scalar, dtype=torch.float32, device="cpu")
