"""MaskPlan: what one step does to a set of parameters, in plain numbers. No tensors, no devices.

A policy (policies.py) and the group's Clock make plans; the backends carry them out and know nothing of policies,
groups or schedules.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class MaskPlan:
    """One mask rule. ``kind`` says which fields matter:

    ``keep``       every element is updated as AdamW does.
    ``off``        no element is: a dropped block. With ``frozen`` the tensors are not touched at all.
    ``bernoulli``  an element is kept when its 16-bit draw is >= ``threshold``;
                   kept gradients are multiplied by ``scale``.
    ``gaussian``   every gradient is multiplied by N(1, ``scale``^2).
    ``bucket``     an element is kept when first_bucket <= bucket <= last_bucket, out of ``buckets``.
    ``fixed``      an element is kept when its bit in the given mask is set; kept gradients are multiplied by ``scale``.
    """

    kind: str
    frozen: bool = False  # dropped elements: param and moments untouched; else their gradient is 0
    threshold: int = 0  # round(p * 2^16)
    scale: float = 1.0
    draw: int | None = None  # the Philox draw; None: the parameter's own step before this update
    buckets: int = 0
    first_bucket: int = 0
    last_bucket: int = 0
    bitpacked: bool = False
    # Which step the bias corrections see. Default: the parameter's own step t after this update (1 first).
    ages: tuple[int, ...] = ()  # by bucket: steps in which it was active, this one included; an age is at most t
    age_rate: float = (
        1.0  # expected share of the past steps in which an element active now was active: 1 + (t - 1) * age_rate
    )
    global_step: int = 0  # not 0: this number instead

    @property
    def active_fraction(self) -> float:
        """The share of elements kept, exact for the quantised p; of a fixed mask only its bits know."""
        if self.kind == "off":
            return 0.0
        if self.kind == "bernoulli":
            return 1 - self.threshold / 65536
        if self.kind == "bucket":  # draws u with first <= (u * buckets) >> 16 <= last
            return (
                _first_draw(self.last_bucket + 1, self.buckets) - _first_draw(self.first_bucket, self.buckets)
            ) / 65536
        return 1.0


def _first_draw(bucket: int, buckets: int) -> int:
    """The smallest 16-bit draw that falls into ``bucket`` or a later one."""
    return -(-bucket * 65536 // buckets)


@dataclass(frozen=True)
class Clock:
    """A group's position in the training: plain numbers kept in the group.

    ``history`` lists (epoch, completed steps when it began) of every epoch in which the group made a step, in order.
    """

    epoch: int
    completed_steps: int
    history: tuple[tuple[int, int], ...]

    @staticmethod
    def parse_history(text: str) -> tuple[tuple[int, int], ...]:
        """The inverse of ``with_this_step``: "0:0,1:44" -> ((0, 0), (1, 44))."""
        return _parse_history(text)

    def with_this_step(self) -> str:
        """The history as a string for the group, with the step that is being made now counted under its epoch."""
        history = self.history
        if not history or history[-1][0] != self.epoch:
            history += ((self.epoch, self.completed_steps),)
        return ",".join(f"{epoch}:{start}" for epoch, start in history)

    def steps_by_epoch(self) -> Counter[int]:
        """Completed steps of each epoch. An epoch visited twice has its steps added up."""
        ends = [start for _, start in self.history[1:]] + [self.completed_steps]
        steps: Counter[int] = Counter()
        for (epoch, start), end in zip(self.history, ends):
            steps[epoch] += end - start
        return steps


@lru_cache(maxsize=256)
def _parse_history(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(epoch), int(start)) for epoch, start in (entry.split(":") for entry in text.split(",") if entry))


@dataclass(frozen=True)
class PlanContext:
    """What a policy may look at when it makes a plan."""

    clock: Clock
    seed: int
    frozen: bool
    count_active_steps: bool  # bias_correction == "active"
    blocks: tuple[str, ...] = ()  # every block of the model, in forward order
