"""Variants timed in interleaved rounds, their medians with quartiles, and their ratios to the baseline of one round."""

import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .timers import FIRST_LEAD, GpuTimer, RehearsalTimer, Sample, longer_lead

SLOW = 4.0  # variants slower than this many baseline steps run only in every second to tenth round


@dataclass
class Variant:
    """One row. The first of a list is the baseline. ``kind``: "peer", "ours", or "check" (the baseline's twin)."""

    name: str
    kind: str
    step: Callable[[], object]
    backend: str | None = None
    after: Callable[[], object] = lambda: None  # not timed
    moved: Callable[[], float] = lambda: 0.0  # bytes a parameter that the next step has to move
    active: Callable[[], float] = lambda: 1.0  # share of the parameters that the next step trains
    kept_bytes: int = 0  # that it holds beside AdamW's moments
    peak_bytes: int = 0  # that a step takes for itself
    error: str | None = None
    lead: float = FIRST_LEAD
    samples: dict[int, Sample] = field(default_factory=dict)  # by round
    bytes_of: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def run(self, timer: GpuTimer | RehearsalTimer, number: int) -> None:
        moved, share = self.moved(), self.active()
        sample = timer.time(self.step, self.lead)
        self.lead = longer_lead(self.lead, sample)
        self.samples[number] = sample
        self.bytes_of.append(moved)
        self.shares.append(share)
        self.after()

    def forget(self) -> None:
        self.samples.clear(), self.bytes_of.clear(), self.shares.clear()


def attempt(variant: Variant, timer: GpuTimer | RehearsalTimer, work: Callable[[], object]) -> bool:
    """Runs a part of a variant; what it raises becomes its error. Raises where the GPU itself is lost."""
    try:
        work()
        return True
    except Exception as error:  # whatever a peer may raise: it costs its own row only
        variant.error = message(error)
        print(f"{variant.name} left out: {variant.error}", file=sys.stderr, flush=True)
        timer.synchronize()
        return False


def message(error: Exception) -> str:
    """The type and the first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def interleave(
    variants: list[Variant], timer: GpuTimer | RehearsalTimer, deadline: float, min_rounds: int, max_rounds: int
) -> None:
    """Warms up, then runs all variants in rounds, in random order, until the deadline (time.monotonic)."""

    def warm_up(variant: Variant) -> None:
        before = timer.allocated()
        for number in (-3, -2, -1):  # code is compiled and tables are made in the first
            variant.run(timer, number)
        variant.kept_bytes += timer.allocated() - before
        variant.peak_bytes = timer.peak_bytes(variant.step)
        variant.after()

    made = [variant for variant in variants if variant.error is None]
    alive = [variant for variant in made if attempt(variant, timer, functools.partial(warm_up, variant))]
    if not alive or alive[0] is not variants[0]:
        raise RuntimeError(f"no baseline: {variants[0].error}")
    unit = SLOW * variants[0].samples[-1].seconds
    every = {id(variant): min(10, min_rounds, 1 + int(variant.samples[-1].seconds / unit)) for variant in alive}
    every[id(alive[0])] = 1
    for variant in alive:
        variant.forget()
    gc.collect()
    gc.disable()
    number = 0
    while number < min_rounds or (time.monotonic() < deadline and number < max_rounds):
        turn = [v for i, v in enumerate(alive) if v.error is None and (number - i) % every[id(v)] == 0]
        for variant in random.sample(turn, len(turn)):
            attempt(variant, timer, functools.partial(variant.run, timer, number))
        number += 1
    gc.enable()


def quartiles(name: str, values: list[float]) -> dict:
    """{name: median, name_q1, name_q3}."""
    q1, q3 = np.percentile(values, (25, 75)).tolist()
    return {name: statistics.median(values), f"{name}_q1": q1, f"{name}_q3": q3}


def paired(variant: Variant, other: Variant) -> list[float]:
    """Ratios of the rounds in which both ran."""
    rounds = [number for number in variant.samples if number in other.samples]
    return [variant.samples[number].seconds / other.samples[number].seconds for number in rounds]


def summarize(variants: list[Variant], numel: int, copy_gb_per_s: float) -> list[dict]:
    """One row a variant; one that failed has its error and no figure."""
    unmasked = {variant.backend: variant for variant in variants if variant.name == "mask=None" and not variant.error}
    rows = []
    for variant in variants:
        row = {"name": variant.name, "kind": variant.kind, "backend": variant.backend}
        if variant.error or not variant.samples:
            rows.append(row | {"error": variant.error or "no round"})
            continue
        samples = list(variant.samples.values())
        row |= quartiles("seconds", [sample.seconds for sample in samples])
        row |= quartiles("ratio", paired(variant, variants[0]))
        twin = unmasked.get(variant.backend) if variant.kind == "ours" else None
        row["over_unmasked"] = statistics.median(paired(variant, twin)) if twin else None
        moved = statistics.fmean(variant.bytes_of)
        speed = moved * numel / row["seconds"] / 1e9
        row |= {"rounds": len(samples), "active": statistics.fmean(variant.shares), "bytes_per_param": moved}
        row |= {"gb_per_s": speed, "of_copy": speed / copy_gb_per_s}
        row |= {"host_seconds": statistics.median(sample.host_seconds for sample in samples)}
        row |= {"ahead": statistics.fmean(sample.ahead for sample in samples)}
        row |= {"kept_bytes": variant.kept_bytes, "peak_bytes": variant.peak_bytes}
        rows.append(row)
    return rows
