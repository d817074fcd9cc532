"""Clock is a position in the training. PlanContext is everything that a policy may use for a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

History = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Clock:
    """A group's position in the training, in plain numbers that the group keeps.

    ``history`` lists (epoch, completed steps when it began) of the epochs in which the group made a step, in order. The
    steps before its first entry are those of epochs that the policy has folded, so that a history does not grow with
    the training. ``folded`` is all that is left of them: the sum of ``Policy.kept_draws`` over these steps.
    """

    epoch: int
    completed_steps: int
    history: History
    folded: int = 0

    @staticmethod
    def of(epoch: int, completed_steps: int, text: str) -> Clock:
        """The clock of a group that keeps its history as ``text``, see ``with_this_step``."""
        return Clock(epoch, completed_steps, *_parse(text))

    @staticmethod
    def history_of_plain(steps: int) -> str:
        """The history of a group that has made these steps without a mask: every element was trained in all of them."""
        return f"~{65536 * steps}" if steps else ""

    def with_this_step(self, fold: Callable[[History, int], tuple[History, int]]) -> str:
        """The history as a string for the group: "0:0,1:44", or "~2883584,1:44" where epoch 0 is folded. The step that
        is being made now is counted under its epoch. ``fold``: the group's Policy.fold.
        """
        history, folded = self.history, self.folded
        if not history or history[-1][0] != self.epoch:
            history, folded = fold((*history, (self.epoch, self.completed_steps)), folded)
        entries = [f"{epoch}:{start}" for epoch, start in history]
        return ",".join([f"~{folded}", *entries] if folded else entries)

    def steps_by_epoch(self) -> Counter[int]:
        """Completed steps per epoch that is not folded. The steps of an epoch that was visited twice are added up."""
        return steps_by_epoch(self.history, self.completed_steps)


def steps_by_epoch(history: History, end: int) -> Counter[int]:
    """The steps per epoch of a history up to the step ``end``."""
    ends = [start for _, start in history[1:]] + [end]
    steps: Counter[int] = Counter()
    for (epoch, start), stop in zip(history, ends):
        steps[epoch] += stop - start
    return steps


@lru_cache(maxsize=64)
def _parse(text: str) -> tuple[History, int]:
    folded, _, rest = text[1:].partition(",") if text.startswith("~") else ("0", "", text)
    entries = (entry.split(":") for entry in rest.split(",") if entry)
    return tuple((int(epoch), int(start)) for epoch, start in entries), int(folded)


@dataclass(frozen=True)
class PlanContext:
    """Everything that a policy may use when it makes a plan."""

    clock: Clock
    seed: int
    frozen: bool
    count_active_steps: bool  # bias_correction == "active"
    blocks: tuple[str, ...] = ()  # every block of the model, in forward order
