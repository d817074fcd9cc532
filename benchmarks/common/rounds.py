"""The timing engine: variants in interleaved rounds, their medians, and their ratios to the baseline of one round."""

import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .timers import FIRST_LEAD, Sample, Timer, longer_lead

SLOW = 4.0  # variants slower than this many baseline steps do not run in every round
SO_FAR = 2.0  # seconds between two calls of ``so_far``
FIFTHS = {"p20": 20, "p80": 80}  # percentiles by the suffixes of their names, as the CPU's results have them
QUARTILES = {"q1": 25, "q3": 75}  # as the GPU's results have them


def nothing() -> None:
    pass


@dataclass
class Variant:
    """A row of a table. The first of a list is the baseline.

    ``kind``: "peer", "ours", "sweep", or "check": the twin of another row, which checks the method. ``by``: the backend
    or the instruction set that runs it.
    """

    name: str
    kind: str
    step: Callable[[], object] = nothing
    by: str | None = None
    before: Callable[[], object] = nothing  # not timed, like ``after``
    after: Callable[[], object] = nothing
    moved: Callable[[], float] = lambda: 0.0  # bytes per parameter that the next step has to move
    active: Callable[[], float] = lambda: 1.0  # share of the parameters that the next step trains
    kept_bytes: int = 0  # kept beside AdamW's moments
    peak_bytes: int = 0  # allocated during a step
    error: str | None = None
    lead: float = FIRST_LEAD
    samples: dict[int, Sample] = field(default_factory=dict, init=False)  # by round
    bytes_of: list[float] = field(default_factory=list, init=False)
    shares: list[float] = field(default_factory=list, init=False)

    def run(self, timer: Timer, number: int) -> None:
        self.before()
        self.bytes_of.append(self.moved())
        self.shares.append(self.active())
        self.samples[number] = sample = timer.time(self.step, self.lead)
        self.lead = longer_lead(self.lead, sample)
        self.after()

    def forget(self) -> None:
        self.samples.clear(), self.bytes_of.clear(), self.shares.clear()

    @property
    def seconds(self) -> list[float]:
        return [sample.seconds for sample in self.samples.values()]


def attempt(variant: Variant, timer: Timer, work: Callable[[], object]) -> bool:
    """Runs a part of a variant. What it raises becomes the variant's error. Raises if the GPU itself is lost."""
    try:
        work()
        return True
    except Exception as error:  # whatever a peer raises costs its own row only
        if timer.strict:
            raise
        variant.error = message(error)
        print(f"{variant.name} left out: {variant.error}", file=sys.stderr, flush=True)
        timer.synchronize()
        return False


def message(error: Exception) -> str:
    """Returns the type and the first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def interleave(
    variants: list[Variant], timer: Timer, deadline: float, min_rounds: int, max_rounds: int,
    rarest: int = 10, label: str | None = None, so_far: Callable[[], object] = nothing,
) -> None:  # fmt: skip
    """Warms up, then runs all variants in rounds, in random order, until the deadline (time.monotonic).

    Slow ones run in every second to ``rarest``-th round. ``label``: a name for the rounds in the progress lines.
    ``so_far``: called every few seconds between two rounds, to write what there is.
    """

    def warm_up(variant: Variant) -> None:
        before = timer.allocated()
        for number in range(-timer.warm_up, 0):
            variant.run(timer, number)
        variant.kept_bytes += timer.allocated() - before
        variant.peak_bytes = timer.peak_bytes(variant.step)
        variant.after()

    made = [variant for variant in variants if variant.error is None]
    alive = [variant for variant in made if attempt(variant, timer, functools.partial(warm_up, variant))]
    if not alive or alive[0] is not variants[0]:
        raise RuntimeError(f"no baseline: {variants[0].error}")
    unit = SLOW * variants[0].samples[-1].seconds
    every = {id(variant): min(rarest, min_rounds, 1 + int(variant.samples[-1].seconds / unit)) for variant in alive}
    every[id(alive[0])] = 1
    for variant in alive:
        variant.forget()
    gc.collect()
    gc.disable()
    number, told = 0, time.monotonic()
    while number < min_rounds or (time.monotonic() < deadline and number < max_rounds):
        turn = [v for i, v in enumerate(alive) if v.error is None and (number - i) % every[id(v)] == 0]
        for variant in random.sample(turn, len(turn)):
            attempt(variant, timer, functools.partial(variant.run, timer, number))
        number += 1
        if time.monotonic() - told > SO_FAR:
            so_far()
            told = time.monotonic()
        if label and number % 10 == 0:
            print(f"{label}: {number} rounds, {max(0, deadline - time.monotonic()):.0f} s left", file=sys.stderr)
    gc.enable()


def spread(name: str, values: list[float], percentiles: dict[str, int]) -> dict:
    """Returns {name: median, and each percentile as name_<its suffix>}."""
    ends = np.percentile(values, list(percentiles.values())).tolist()
    return {name: statistics.median(values), **{f"{name}_{end}": value for end, value in zip(percentiles, ends)}}


def paired(variant: Variant, other: Variant) -> list[float]:
    """Returns the ratios of the rounds in which both ran."""
    rounds = [number for number in variant.samples if number in other.samples]
    return [variant.samples[number].seconds / other.samples[number].seconds for number in rounds]


def summarize(
    variants: list[Variant], percentiles: dict[str, int], figures: Callable[[Variant, dict], dict],
    by: str | None = None,
) -> list[dict]:  # fmt: skip
    """Returns a row per variant. One that failed has its error and no figure.

    ``figures``: returns further figures of a variant, given its row so far. ``by``: the key of the variant's ``by`` in
    the rows.
    """
    rows = []
    for variant in variants:
        row = {"name": variant.name, "kind": variant.kind} | ({by: variant.by} if by else {})
        ratios = paired(variant, variants[0])
        if variant.error or not ratios:
            rows.append(row | {"error": variant.error or "no round"})
            continue
        row |= spread("seconds", variant.seconds, percentiles)
        row |= spread("ratio", ratios, percentiles)
        rows.append(row | figures(variant, row))
    return rows
