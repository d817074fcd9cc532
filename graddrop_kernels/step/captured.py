"""CapturedStep: a step in a CUDA graph. What its replays read is kept here, and brought up to date before each."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..backends import capture
from ..backends.batch import Hyper
from ..groups.masking import Masking
from ..groups.owner import Owner
from ..policies import Clock
from ..tensors.local import local_tensors
from .prepared import PreparedStep


class CapturedStep:
    """Holds every tensor whose address the graph has, except the gradients, and what the graph was captured for."""

    def __init__(
        self, owner: Owner, prepared: PreparedStep, tensors: list[torch.Tensor], state: Mapping[torch.Tensor, Any]
    ) -> None:  # fmt: skip
        self._prepared = copy.copy(prepared)  # later steps choose other parts of the original
        self._tables = [part.batch.table for part in prepared.parts]
        self.devices = {part.batch.device for part in prepared.parts}
        self._options = _options(owner)
        self._tensors = prepared.addressed_tensors(tensors, state)
        self._addresses = _addresses(self._tensors)
        self._planned: list[list[Hyper]] = []  # of each table

    @property
    def group_indices(self) -> set[int]:
        return self._prepared.group_indices

    def plan(
        self, owner: Owner, masking: Masking, params: list[torch.Tensor], made_for: object, clocks: list[Clock]
    ) -> str | None:  # fmt: skip
        """Plans the step at the time of ``clocks``. Returns the reason why a replay would not be that step, or None."""
        if self._prepared.made_for != made_for or self._options != _options(owner):
            return "its groups, max_grad_norm or another option that the graph holds have changed"
        if not self._has_tensors_of(owner, params):
            return "its parameters or their state are no longer those of the capture"
        self._planned = [
            [masking.hyper(index, unit, clocks[index]) for index, unit in part.plans_of]
            for part in self._prepared.parts
        ]
        if not all(table.can_replay(hypers) for table, hypers in zip(self._tables, self._planned)):
            return "its masks are of another kind, or other blocks are frozen"
        return None

    def refresh(self) -> None:
        """Brings the hyper-parameters that were planned to the device, for the next replay."""
        for table, hypers in zip(self._tables, self._planned):
            table.refresh_captured(hypers)

    def release(self) -> None:
        """Drops parameters and state, for a graph that was replaced. Its tables, which are small, stay."""
        self._tensors = []

    def _has_tensors_of(self, owner: Owner, params: list[torch.Tensor]) -> bool:
        # The tensors of then are held, so that no others can have their addresses.
        if len(owner.state) != self._prepared.state_size:
            return False
        tensors = local_tensors(params[position] for position in self._prepared.there)
        return _addresses(self._prepared.addressed_tensors(tensors, owner.state)) == self._addresses


def check_capture(prepared: PreparedStep | None, devices: Collection[torch.device], with_scaler: bool) -> None:
    """Raises RuntimeError for a step that the graph could not hold.

    Args:
        prepared: the step that was prepared before; None if this one needs another.
        devices: those of all parameters that are stepped, one of which is capturing.
    """
    outside = [device for device in devices if not capture.capturing(device)]
    if outside:
        raise RuntimeError(
            f"a CUDA graph is being captured, and parameters on {outside[0]} would be stepped outside of it, once: "
            "capture the step of an optimizer whose parameters are all on the graph's device"
        )
    if with_scaler:
        raise RuntimeError(
            "a CUDA graph is being captured, and the host would not learn which of its replays a GradScaler turns into "
            "no-ops: call scaler.step(optimizer) outside of the graph"
        )
    for part in prepared.parts if prepared is not None else ():
        if not part.backend.capturable:
            raise RuntimeError(
                f"a step of the backend {part.backend.name!r} cannot be captured in a CUDA graph: the host computes "
                "with numbers of each step; call step() outside of the graph"
            )
        if part.batch.table is None or part.batch.table.is_captured:
            prepared = None
            break
    if prepared is None:
        raise RuntimeError(capture.UNPREPARED)


def _options(owner: Owner) -> tuple[Any, ...]:
    """What is a constant in a graph, beside what a step is prepared for."""
    return owner.max_grad_norm, owner.norm_after_mask


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, local_tensors(tensors)))
