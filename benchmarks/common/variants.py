"""Makes variants of ours and of the peers, and the figures of their rows beside times and ratios."""

import functools
import statistics
import time
from dataclasses import replace

from graddrop_kernels.backends import cpu

from .cases import ALL_STREAMS, HYPERS, Case, active_share, make_optimizer
from .peers import BASELINE, Peer, unavailable
from .rounds import FIFTHS, QUARTILES, Variant, attempt, paired, summarize
from .tensors import MODES, Tensors, bytes_per_param
from .timers import Timer


def ours(case: Case, tensors: Tensors, mode: str, backend: str, timer: Timer) -> Variant:
    """Makes the variant, or one with its error."""
    variant = Variant(case.name, "ours", by=backend)

    def make() -> None:
        before = timer.allocated()
        optimizer = make_optimizer(case, tensors, backend)
        case.enter_last_epoch(optimizer)
        variant.step, variant.kept_bytes = optimizer.step, timer.allocated() - before
        full, grad = bytes_per_param(mode), MODES[mode][0].itemsize
        dropped = {ALL_STREAMS: full, 0: 0}.get(case.dropped_streams, full - grad)
        variant.moved = lambda: full + case.mask_bits / 8
        if case.needs_blocks:  # blocks change from step to step, and active_fraction() is plain arithmetic
            variant.active = lambda: active_share(optimizer)
            variant.moved = lambda: full * variant.active() + dropped * (1 - variant.active())

    attempt(variant, timer, make)
    return variant


def on_isas(variant: Variant, isas: list[str]) -> list[Variant]:
    """Repeats the step on each instruction set of the CPU."""
    return [replace(variant, by=isa, before=functools.partial(cpu.select_isa, isa)) for isa in isas]


def peer_variant(peer: Peer, tensors: Tensors, mode: str, timer: Timer, name: str = "", kind: str = "peer") -> Variant:
    """Makes a peer's variant. Its bytes are AdamW's with moments in the mode's dtypes, whatever the peer moves."""
    variant = Variant(name or peer.name, kind)
    reason = unavailable(peer) or (None if mode in peer.modes else f"does not do {mode}")
    if reason:
        variant.error = reason
        return variant

    def make() -> None:
        before = timer.allocated()
        variant.step, variant.after = peer.make(tensors, HYPERS)
        variant.kept_bytes = timer.allocated() - before

    variant.moved = lambda: bytes_per_param(mode)
    if attempt(variant, timer, make) and peer is BASELINE and MODES[mode][0] != MODES[mode][1]:
        variant.moved = lambda: bytes_per_param("bfloat16")  # torch keeps bfloat16 moments there
    return variant


def _traffic(variant: Variant, row: dict, numel: int) -> dict:
    moved = statistics.fmean(variant.bytes_of)
    speed = moved * numel / row["seconds"] / 1e9
    return {"active": statistics.fmean(variant.shares), "bytes_per_param": moved, "gb_per_s": speed}


def cpu_rows(variants: list[Variant], numel: int) -> list[dict]:
    """Returns a row per variant and instruction set: medians, 20th and 80th percentiles."""

    def figures(variant: Variant, row: dict) -> dict:
        of_threads = statistics.median(sample.host_seconds for sample in variant.samples.values())
        found = {"repetitions": len(variant.samples), "cpu_seconds": of_threads}
        return found | {"ns_per_param": row["seconds"] / numel * 1e9, **_traffic(variant, row, numel)}

    return summarize(variants, FIFTHS, figures, "isa")


def gpu_rows(variants: list[Variant], numel: int, copy_gb_per_s: float) -> list[dict]:
    """Returns a row per variant and backend: medians and quartiles."""
    unmasked = {variant.by: variant for variant in variants if variant.name == "mask=None" and not variant.error}

    def figures(variant: Variant, row: dict) -> dict:
        twin = unmasked.get(variant.by) if variant.kind == "ours" else None
        pairs = paired(variant, twin) if twin else []  # two slow ones may have had no round together
        samples, traffic = variant.samples.values(), _traffic(variant, row, numel)
        return {
            "over_unmasked": statistics.median(pairs) if pairs else None,
            "rounds": len(samples), **traffic, "of_copy": traffic["gb_per_s"] / copy_gb_per_s,
            "host_seconds": statistics.median(sample.host_seconds for sample in samples),
            "ahead": statistics.fmean(sample.ahead for sample in samples),
            "kept_bytes": variant.kept_bytes, "peak_bytes": variant.peak_bytes,
        }  # fmt: skip

    return summarize(variants, QUARTILES, figures, "backend")


def show(config: dict, began: float) -> None:
    """Prints a configuration of the GPU, row by row."""
    elapsed = time.monotonic() - began
    print(f"{config['work']}, {config['mode']}: copy {config['copy']['gb_per_s']:.0f} GB/s, {elapsed:.0f} s")
    for row in config["rows"]:
        name = f"{row['name']} [{row['backend']}]" if row["backend"] else row["name"]
        figures = row.get("error")
        if figures is None:
            figures = f"{row['seconds'] * 1e3:9.3f} ms {row['ratio']:7.3f} {row['of_copy']:5.0%} of copy"
        print(f"  {name:<44}{figures}", flush=True)
