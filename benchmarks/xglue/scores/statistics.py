"""Statistics of paired runs: plain functions of lists of floats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean; ValueError for no values."""
    if not values:
        raise ValueError("the mean of no values")
    return math.fsum(values) / len(values)


def sd(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of a sample (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Paired:
    """The paired two-sided t test of n differences: their mean, sd, t, p, and the mean's confidence interval.

    For n = 1 all but ``difference`` and ``n`` are None. If all differences are equal, sd is 0 and t infinite (p 0); if
    they are all 0, t is 0 (p 1).
    """

    difference: float
    n: int
    sd: float | None = None
    t: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None


def paired(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Paired:
    """Tests the differences first - second, pair by pair (Student 1908).

    Args:
        confidence: of the interval ``low`` to ``high``, in (0, 1).

    Raises:
        ValueError: no pairs, different lengths, or ``confidence`` out of range.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need equally many values, got {len(first)} and {len(second)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    differences = [a - b for a, b in zip(first, second)]
    centre, spread, n = mean(differences), sd(differences), len(differences)
    if spread is None:
        return Paired(centre, n)
    error = spread / math.sqrt(n)
    if error == 0:
        t = math.copysign(math.inf, centre) if centre else 0.0
        return Paired(centre, n, spread, t, 0.0 if centre else 1.0, centre, centre)
    t = centre / error
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Paired(centre, n, spread, t, 2 * float(stdtr(n - 1, -abs(t))), centre - half, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for that many tests, in the given order (Holm 1979): reject if at most alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
