"""How the time of a step on the GPU grows: with the elements, with the number of tensors, with what is not frozen.

Sizes: one tensor of 1e5 to 1e9 elements; small ones rotate among several sets of buffers, so that none lies in the
cache. Tensors: the same elements in 1 to 4000 tensors. Frozen: the blocks of XLM-R-large (no embeddings), of which
GradFreeze leaves some untouched.
"""

import gc
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import graddrop_kernels as gk

from ..common.cases import CASE, Case, backends_for
from ..common.machine import Load
from ..common.peers import BASELINE
from ..common.results import gpu_arguments
from ..common.rounds import Variant, interleave, message
from ..common.rows import Recorder
from ..common.shapes import COUNT_TOTALS, COUNTS, SIZES, WORK, Named, flat
from ..common.tensors import MODES, bytes_per_param, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copies_past_l2, copy_bandwidth, rotate
from ..common.variants import gpu_rows, ours, peer_variant
from .alone import run_alone

MEASURED = ("mask=None", "GradDrop")
TRAINED = (1.0, 0.75, 0.5, 0.25, 0.125, 0.05)  # shares of the blocks; the first has nothing frozen


def points(
    shapes: list[Named], mode: str, copies: int, timer: GpuTimer | RehearsalTimer, seconds: float, copy: dict
) -> list[dict]:
    """Measures torch's step and ours on ``copies`` sets of the same tensors, one after the other."""
    sets = [make_tensors(shapes, mode, timer.device) for _ in range(copies)]
    moved = bytes_per_param(mode)

    def variant(name: str, backend: str | None) -> Variant:
        of_set = [
            ours(CASE[name], tensors, mode, backend, timer) if backend else peer_variant(BASELINE, tensors, mode, timer)
            for tensors in sets
        ]
        kind = "ours" if backend else "peer"
        made = Variant(name, kind, rotate([one.step for one in of_set]), backend, moved=lambda: moved)
        made.error = next((one.error for one in of_set if one.error), None)
        return made

    variants = [variant(BASELINE.name, None)]
    variants += [variant(name, backend) for backend in backends_for(timer.device, mode) for name in MEASURED]
    least, most = (2, 2) if timer.rehearsal else (3 * copies, 100)
    interleave(variants, timer, time.monotonic() + seconds, least, most)
    rows = gpu_rows(variants, sets[0].numel, copy["gb_per_s"])
    facts = {"numel": sets[0].numel, "tensors": len(shapes), "mode": mode, "copies": copies}
    return [facts | row for row in rows]


def size_sweep(mode: str, timer, seconds: float, copy: dict) -> Iterator[dict]:
    for size in SIZES:
        numel = size // 10_000 if timer.rehearsal else size
        copies = copies_past_l2(numel * bytes_per_param(mode), timer.l2_bytes)
        yield from survive(points, flat(numel), mode, copies, timer, seconds / len(SIZES), copy)
        timer.release()


def count_sweep(mode: str, timer, seconds: float, copy: dict) -> Iterator[dict]:
    counts = COUNTS[:3] if timer.rehearsal else COUNTS
    for total in COUNT_TOTALS:
        for count in counts:
            numel = total // 1000 if timer.rehearsal else total
            share = seconds / len(COUNT_TOTALS) / len(counts)
            for row in survive(points, flat(numel, count), mode, 1, timer, share, copy):
                yield {"total": total, **row}
        timer.release()


def frozen_sweep(mode: str, timer, seconds: float, copy: dict) -> Iterator[dict]:
    """Measures frozen blocks. The first row, nothing frozen, is the baseline. ``active``: the share of parameters
    trained.
    """
    shapes = WORK["xlmr_large"].small() if timer.rehearsal else WORK["xlmr_large"].tensors()
    tensors = make_tensors([named for named in shapes if named[1] is not None], mode, timer.device)
    layers = len(set(tensors.blocks))
    trained = dict.fromkeys(max(1, round(share * layers)) for share in TRAINED)
    freeze = gk.GradFreeze(layers, blocks_per_epoch=1)
    backends = backends_for(timer.device, mode)
    for backend in backends:
        variants = []
        for count in trained:
            name, epochs = f"{count} of {layers} blocks trained", (count - 1,)
            case = Case(name, lambda named: freeze, epochs, dropped_streams=0, needs_blocks=True)
            variants.append(ours(case, tensors, mode, backend, timer))
        least, most = (2, 2) if timer.rehearsal else (5, 100)
        interleave(variants, timer, time.monotonic() + seconds / len(backends), least, most)
        facts = {"numel": tensors.numel, "tensors": len(tensors.named), "mode": mode}
        yield from (facts | row for row in gpu_rows(variants, tensors.numel, copy["gb_per_s"]))


def survive(work, *arguments) -> Iterator[dict]:
    """Yields the rows, or one with the error, such as too large for this GPU's memory."""
    try:
        yield from work(*arguments)
    except Exception as error:
        print(f"left out: {message(error)}", file=sys.stderr, flush=True)
        yield {"name": "all", "kind": "error", "backend": None, "error": message(error)}
    finally:
        gc.collect()


SWEEPS = {"frozen": (frozen_sweep, 0.2), "sizes": (size_sweep, 0.4), "counts": (count_sweep, 0.4)}  # shares of time


def run(
    recorder: Recorder, timer: GpuTimer | RehearsalTimer, seconds: float, sweeps: Iterable[str] = tuple(SWEEPS),
    modes: Sequence[str] = ("float32", "bfloat16"),
) -> int:  # fmt: skip
    """Makes the sweeps. Returns how many rows failed."""
    load, failed = Load(), 0
    recorder.begin("sweeps_gpu", *SWEEPS)
    copy = copy_bandwidth(timer)
    recorder.put("sweeps_gpu", "copy", copy)
    of_all = sum(SWEEPS[name][1] for name in sweeps) * len(modes)
    for name in sweeps:
        sweep, share = SWEEPS[name]
        for mode in modes:
            for row in survive(sweep, mode, timer, seconds * share / of_all, copy):
                recorder.add("sweeps_gpu", name, {**row, "mode": mode})
                failed += row["kind"] == "error"
            recorder.put("sweeps_gpu", "load", load.report())
            print(f"{name}, {mode}: done", flush=True)
            timer.release()
    return failed


def main() -> int:
    parser = gpu_arguments(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["float32", "bfloat16"])
    options = parser.parse_args()
    return run_alone(run, options, modes=options.modes)


if __name__ == "__main__":
    sys.exit(main())
