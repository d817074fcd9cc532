"""Frees the moments of blocks that do not have their turn: SampleBlocks and CycleBlocks with ``idle_state="drop"``."""

from typing import Any

import torch

from ..groups.masking import Masking
from ..groups.owner import Owner
from ..policies import Clock

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def drops_idle_state(masking: Masking, index: int) -> bool:
    """Whether a group keeps moments only of the blocks that have their turn."""
    return getattr(masking.policy(index), "idle_state", "keep") == "drop"


def drop_gradient(owner: Owner, masking: Masking, param: torch.Tensor, clocks: list[Clock]) -> int | None:
    """Drops the gradient and the moments of an idle parameter. Returns the index of its group; None if it has its turn,
    or keeps its moments.
    """
    index, _ = masking.find(param)
    if not drops_idle_state(masking, index):
        return None
    _check(masking, index)
    if masking.plan(index, masking.record_of(param).unit, clocks[index]).kind != "off":
        return None
    _free(param, owner.state[param])
    param.grad = None
    return index


def _check(masking: Masking, index: int) -> None:
    """Raises ValueError for a group that cannot do without the moments of idle blocks."""
    for name, remedy in (("stochastic_rounding", "master_weights=True"), ("stochastic_moments", "float32 moments")):
        if masking[index][name]:
            raise ValueError(
                f"idle_state='drop' begins each turn with a step count of 0, by which {name}=True draws, so every turn "
                f"would have the same noise: use {remedy}, or idle_state='keep'"
            )
    if any(record.flat for record in masking.records(index)):
        raise ValueError(
            "idle_state='drop' cannot free the moments of blocks within a flat buffer, as FSDP1 and DeepSpeed make "
            "them: use idle_state='keep', or FSDP2"
        )


class IdleBlocks:
    """What one step leaves out, as it would stay as it is: blocks without a turn, in groups that drop their state.

    ``grads`` are the gradients of all parameters without theirs, ``groups`` those that have lost any. ``any_group``
    says whether there are such groups at all.
    """

    def __init__(
        self, owner: Owner, masking: Masking, clocks: list[Clock], grads: list[torch.Tensor | None]
    ) -> None:  # fmt: skip
        """Raises ValueError if the step needs what it would leave out."""
        self.grads, self.groups = grads, set[int]()
        self._state, self._idle = owner.state, list[torch.Tensor]()
        dropping = [index for index in masking.indices() if drops_idle_state(masking, index)]
        self.any_group = bool(dropping)
        if not dropping:
            return
        if owner.max_grad_norm is not None and not owner.norm_after_mask:
            raise ValueError(
                f"max_grad_norm={owner.max_grad_norm!r} is a limit on the norm of all gradients, and idle_state='drop' "
                "leaves out those of blocks without a turn: set norm_after_mask=True, which counts them as 0, or "
                "max_grad_norm=None"
            )
        self.grads, start = list(grads), 0
        for index, group in enumerate(owner.param_groups):
            if index in dropping:
                _check(masking, index)
                self._leave_out(masking, index, clocks[index], start)
            start += len(group["params"])

    def _leave_out(self, masking: Masking, index: int, clock: Clock, start: int) -> None:
        """Leaves out what is idle of a group whose first parameter has the position ``start`` among all."""
        records = masking.records(index)
        units = {record.unit for record in records}
        off = {unit for unit in units if masking.plan(index, unit, clock).kind == "off"}
        for position, (param, record) in enumerate(zip(masking[index]["params"], records), start):
            if record.unit not in off:
                continue
            if self.grads[position] is not None:
                self.groups.add(index)
            if self.grads[position] is not None or param in self._state:
                self._idle.append(param)
            self.grads[position] = None

    def free(self) -> None:
        """Frees the moments of idle blocks. When their turn comes they start at zero, with a step count of 0."""
        for param in self._idle:
            _free(param, self._state[param])


def _free(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Keeps a count of 0, by which skip_dropped() knows a parameter that has gradients, and the master."""
    if [name for name in _MOMENTS if state.pop(name, None) is not None] or "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
