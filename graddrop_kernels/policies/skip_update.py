"""SkipUpdate: leaves out the update of whole parameters at random (beyond the paper)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..masks.philox import block_uniform16, stream_key
from ..masks.plan import MaskPlan
from .clock import PlanContext
from .policy import Policy, _check_p, _freeze_values
from .schedules import Schedule, drop_probability, quantize


@dataclass(frozen=True)
class SkipUpdate(Policy):
    """Leaves out the update of a parameter with probability p and multiplies the others by 1/(1-p). The moments see
    every gradient (arXiv 2602.15322, without the alignment factor of its Magma). One draw in each step decides on a
    whole parameter tensor.

    Args:
        p: probability that a parameter keeps its values in a step, in [0, 1), quantised to 2^-16, or a schedule.

    Raises:
        ValueError: p outside of [0, 1), or one that rounds to 0 or 1 without being it.
    """

    p: Schedule = 0.5
    masked = "update"
    takes_any_masked = False  # dropped gradients, or frozen moments, of whole parameters are Layer-GradDrop's
    draws = None

    def __post_init__(self) -> None:
        _freeze_values(self, p=_check_p(self.p))

    def unit(self, name: str, block: str | None) -> Hashable:
        return name

    def plan(self, context: PlanContext, unit: Any) -> MaskPlan:
        threshold = quantize(drop_probability(self.p, context.clock.epoch))
        keep = block_uniform16(stream_key(unit, context.seed), context.clock.completed_steps) >= threshold
        return MaskPlan("keep" if keep else "off", scale=65536 / (65536 - threshold))
