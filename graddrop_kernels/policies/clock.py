"""Clock is a position in the training. PlanContext is everything that a policy may use for a plan."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Clock:
    """A group's position in the training, in plain numbers that the group keeps.

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
        """The history as a string for the group. The step that is being made now is counted under its epoch."""
        history = self.history
        if not history or history[-1][0] != self.epoch:
            history += ((self.epoch, self.completed_steps),)
        return ",".join(f"{epoch}:{start}" for epoch, start in history)

    def steps_by_epoch(self) -> Counter[int]:
        """Completed steps per epoch. The steps of an epoch that was visited twice are added up."""
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
    """Everything that a policy may use when it makes a plan."""

    clock: Clock
    seed: int
    frozen: bool
    count_active_steps: bool  # bias_correction == "active"
    blocks: tuple[str, ...] = ()  # every block of the model, in forward order
