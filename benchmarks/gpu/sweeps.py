"""How the time of a step on the GPU grows: with the elements, with the number of tensors, with what is not frozen.

Sizes: one tensor of 1e5 to 1e9 elements; small ones rotate among several sets of buffers, so that none lies in the
cache. Tensors: the same elements in 1 to 4000 tensors. Frozen: the blocks of XLM-R-large (no embeddings), of which
GradFreeze leaves some untouched.
"""

import gc
import sys
import time

import graddrop_kernels as gk

from ..common.cases import CASE, Case, backends_for
from ..common.machine import Load
from ..common.peers import BASELINE
from ..common.results import gpu_arguments, write_gpu
from ..common.rounds import Variant, interleave, message
from ..common.shapes import COUNT_TOTALS, COUNTS, SIZES, WORK, Named, flat
from ..common.tensors import MODES, bytes_per_param, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copies_past_l2, copy_bandwidth, make_timer, rotate
from ..common.variants import gpu_rows, ours, peer_variant

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


def size_sweep(mode: str, timer, seconds: float, copy: dict) -> list[dict]:
    rows = []
    for size in SIZES:
        numel = size // 10_000 if timer.rehearsal else size
        copies = copies_past_l2(numel * bytes_per_param(mode), timer.l2_bytes)
        rows += survive(points, flat(numel), mode, copies, timer, seconds / len(SIZES), copy)
        timer.release()
    return rows


def count_sweep(mode: str, timer, seconds: float, copy: dict) -> list[dict]:
    rows = []
    counts = COUNTS[:3] if timer.rehearsal else COUNTS
    for total in COUNT_TOTALS:
        for count in counts:
            numel = total // 1000 if timer.rehearsal else total
            share = seconds / len(COUNT_TOTALS) / len(counts)
            found = survive(points, flat(numel, count), mode, 1, timer, share, copy)
            rows += [{"total": total, **row} for row in found]
        timer.release()
    return rows


def frozen_sweep(mode: str, timer, seconds: float, copy: dict) -> list[dict]:
    """Measures frozen blocks. The first row, nothing frozen, is the baseline. ``active``: the share of parameters
    trained.
    """
    shapes = WORK["xlmr_large"].small() if timer.rehearsal else WORK["xlmr_large"].tensors()
    tensors = make_tensors([named for named in shapes if named[1] is not None], mode, timer.device)
    layers = len(set(tensors.blocks))
    trained = dict.fromkeys(max(1, round(share * layers)) for share in TRAINED)
    freeze = gk.GradFreeze(layers, blocks_per_epoch=1)
    rows = []
    for backend in backends_for(timer.device, mode):
        variants = []
        for count in trained:
            name, epochs = f"{count} of {layers} blocks trained", (count - 1,)
            case = Case(name, lambda named: freeze, epochs, dropped_streams=0, needs_blocks=True)
            variants.append(ours(case, tensors, mode, backend, timer))
        least, most = (2, 2) if timer.rehearsal else (5, 100)
        interleave(variants, timer, time.monotonic() + seconds / 3, least, most)
        facts = {"numel": tensors.numel, "tensors": len(tensors.named), "mode": mode}
        rows += [facts | row for row in gpu_rows(variants, tensors.numel, copy["gb_per_s"])]
    return rows


def survive(work, *arguments) -> list[dict]:
    """Returns the rows, or one with the error, such as too large for this GPU's memory."""
    try:
        return work(*arguments)
    except Exception as error:
        print(f"left out: {message(error)}", file=sys.stderr, flush=True)
        return [{"name": "all", "kind": "error", "backend": None, "error": message(error)}]
    finally:
        gc.collect()


def main() -> int:
    parser = gpu_arguments(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["float32", "bfloat16"])
    options = parser.parse_args()
    timer, load = make_timer(options.rehearse), Load()
    copy, results = copy_bandwidth(timer), {"sizes": [], "counts": [], "frozen": []}
    sweeps = {"frozen": (frozen_sweep, 0.2), "sizes": (size_sweep, 0.4), "counts": (count_sweep, 0.4)}
    for name, (sweep, share) in sweeps.items():
        for mode in options.modes:
            seconds = options.budget * share / len(options.modes)
            results[name] += survive(sweep, mode, timer, seconds, copy)
            for row in results[name]:
                row.setdefault("mode", mode)
            path = write_gpu("sweeps_gpu", options, {"copy": copy, "load": load.report(), **results})
            print(f"{name}, {mode}: {len(results[name])} rows", flush=True)
            timer.release()
    print(path, flush=True)
    return 1 if any(row["kind"] == "error" for rows in results.values() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
