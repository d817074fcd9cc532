"""Schedules: pure functions epoch -> drop probability p. No tensors, no state."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearAnneal:
    """The paper's annealing (section III-B). p starts at ``start`` and falls by the same amount every epoch.

    Args:
        epochs: number of training epochs T >= 1.
        start: p at epoch 0, in [0, 1). The paper's is 0.9.
        end: ``"paper"`` falls by 1/T per epoch as printed, max(0, start - epoch/T). With the paper's start it reaches 0
            in the last epoch only for T = 10; T = 3 ends at 0.23. ``"zero"`` is rescaled so that the last epoch has
            p = 0 for any T.

    Raises:
        ValueError: an argument out of range.
    """

    epochs: int
    start: float = 0.9
    end: str = "paper"

    def __post_init__(self) -> None:
        require_epochs("LinearAnneal(epochs=)", self.epochs)
        require_probability("LinearAnneal(start=)", self.start)
        if self.end not in ("paper", "zero"):
            raise ValueError(f"LinearAnneal(end=) must be 'paper' or 'zero', got {self.end!r}")
        object.__setattr__(self, "start", float(self.start))  # so that equal schedules have equal JSON

    def __call__(self, epoch: int) -> float:
        if self.end == "paper":
            return _or_zero(self.start - epoch / self.epochs)
        # With T = 1 there is nothing to fall over: the only epoch is the last one.
        last = self.epochs - 1
        return _or_zero(self.start * (1 - epoch / last)) if epoch < last else 0.0


@dataclass(frozen=True)
class ExponentialAnneal:
    """p = start * decay^epoch (beyond the paper).

    Args:
        start: p at epoch 0, in [0, 1).
        decay: factor per epoch, in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """

    start: float
    decay: float

    def __post_init__(self) -> None:
        require_probability("ExponentialAnneal(start=)", self.start)
        if not 0 < self.decay <= 1:
            raise ValueError(f"ExponentialAnneal(decay=) must be in (0, 1], got {self.decay!r}")
        object.__setattr__(self, "start", float(self.start))
        object.__setattr__(self, "decay", float(self.decay))

    def __call__(self, epoch: int) -> float:
        return _or_zero(self.start * self.decay**epoch)


def _or_zero(p: float) -> float:
    """p, or 0 if it has died out. At half a step of the quantised p or below, nothing is left to drop; quantize rounds
    the half itself to 0.
    """
    return p if p * 65536 > 0.5 else 0.0


Schedule = float | LinearAnneal | ExponentialAnneal | Callable[[int], float]


def drop_probability(p: Schedule, epoch: int) -> float:
    """The value of a fixed or scheduled p at an epoch, checked to be in [0, 1)."""
    value = p(epoch) if callable(p) else p
    require_probability(f"p at epoch {epoch}" if callable(p) else "p", value)
    return float(value)


def quantize(p: float) -> int:
    """Returns threshold = round(p * 2^16). An element is dropped when its 16-bit draw is below it. p = 0 gives 0.

    Raises:
        ValueError: p is not 0 but rounds to 0, or rounds to 1. The message names the nearest usable p.
    """
    threshold = round(p * 65536)
    if p > 0 and threshold == 0:
        raise ValueError(
            f"p = {p!r} is below half of 2^-16, the resolution of a mask, and would drop nothing; "
            f"use p = 0 or p >= {1 / 65536:.6g}"
        )
    if threshold == 65536:
        raise ValueError(
            f"p = {p!r} rounds to 1, which would drop everything; the largest usable p is {65535 / 65536:.6g}"
        )
    return threshold


def require_probability(what: str, p: object) -> None:
    """Raises ValueError unless p is a number in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:  # NaN fails the comparison too
        raise ValueError(f"{what} must be a drop probability in [0, 1), got {p!r}")


def require_epochs(what: str, epochs: object) -> None:
    """Raises ValueError unless epochs is an int >= 1."""
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"{what} must be the number of training epochs, an int >= 1, got {epochs!r}")
