"""Time of a step on the GPU in each mode of 16-bit training and with clipping, beside the peers that offer it.

The tables of common/modes.py. A ratio is the median over rounds of a time over that of the table's first peer in the
same round. Peers that compile for long come last, on the first work only, so that they can cost no other row. Rows are
written while the rounds go on.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable

import torch

from ..common.cases import backends_for
from ..common.machine import Load
from ..common.modes import TABLES, Ours, Theirs
from ..common.peers import table as table_of_peers
from ..common.results import gpu_arguments
from ..common.rounds import Variant, interleave, message
from ..common.rows import Recorder
from ..common.shapes import WORK, Work, encoder
from ..common.tensors import Tensors, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copy_bandwidth
from ..common.variants import gpu_rows, show
from .alone import run_alone

WORKS = (
    WORK["xlmr_large"],
    Work("25 layers", lambda: encoder(100_000_000), lambda: encoder(1)[:32]),
)
LATER = f"compiles for long: measured last, on {WORKS[0].label} only"


def theirs(row: Theirs, tensors: Tensors, mode: str, slow: bool, timer) -> Variant:
    if row.peer.slow_start and not slow:
        return Variant(row.peer.name, "peer", error=LATER)
    return row.variant(tensors, mode, timer)


def measure(
    work: Work, name: str, slow: bool, copy: dict, timer: GpuTimer | RehearsalTimer, deadline: float,
    write: Callable[[dict], object],
) -> dict:  # fmt: skip
    """Measures one table. ``slow``: only the peers that compile for long, and the baseline; else all others. ``write``
    is given what there is every few seconds.
    """
    table = TABLES[name]
    tensors = make_tensors(work.small() if timer.rehearsal else work.tensors(), table.mode, timer.device)
    backends = backends_for(timer.device, table.mode)
    baseline, *others = (row for row in table.rows if isinstance(row, Theirs))
    rows = [baseline, *(row for row in others if row.peer.slow_start or not slow)]
    variants = [theirs(row, tensors, table.mode, slow, timer) for row in rows]
    if not slow:
        own = [row for row in table.rows if isinstance(row, Ours)]
        variants[1:1] = [row.variant(tensors, backend, timer) for row in own for backend in backends]
    config = {"table": name, "work": work.label, "mode": table.mode, "numel": tensors.numel}
    config |= {"tensors": len(tensors.named), "backends": backends, "copy": copy}
    so_far = lambda: config | {"rows": gpu_rows(variants, tensors.numel, copy["gb_per_s"])}
    rounds = (2, 2) if timer.rehearsal else (12, 150)
    interleave(variants, timer, deadline, *rounds, so_far=lambda: write(so_far()))
    return so_far()


def with_slow_peers(config: dict, later: dict) -> dict:
    """Replaces the rows that say that they are measured later by these."""
    found = {row["name"]: row for row in later["rows"][1:]}
    return config | {"rows": [found.get(row["name"], row) for row in config["rows"]]}


def run(
    recorder: Recorder, timer: GpuTimer | RehearsalTimer, seconds: float, tables: Iterable[str] = tuple(TABLES),
    works: int = len(WORKS), slow_peers: bool = False,
) -> int:  # fmt: skip
    """Measures the tables on the first ``works`` of WORKS. Returns how many failed, such as for lack of memory."""
    load, began = Load(), time.monotonic()
    plans = [(work, name, False) for work in WORKS[:works] for name in tables]
    in_tables = {name: [row.peer for row in TABLES[name].rows if isinstance(row, Theirs)] for name in tables}
    slow = [name for name, peers in in_tables.items() if any(peer.slow_start for peer in peers)]
    plans += [(WORKS[0], name, True) for name in slow if slow_peers]
    recorder.begin("modes_gpu", "configs", "errors")
    recorder.put("modes_gpu", "peers", table_of_peers(peer for peers in in_tables.values() for peer in peers))
    copy, configs, failed = copy_bandwidth(timer), {}, 0
    for number, (work, name, slow_ones) in enumerate(plans, 1):
        key, deadline = f"{work.label}, {name}", began + seconds * number / len(plans)

        def write(found: dict, key: str = key) -> None:
            config = with_slow_peers(configs[key], found) if key in configs else found
            recorder.add("modes_gpu", "configs", config, key)

        try:
            config = measure(work, name, slow_ones, copy, timer, deadline, write)
            show({**config, "work": key}, began)
            write(config)
            configs.setdefault(key, config)
        except Exception as error:
            failed += 1
            recorder.add("modes_gpu", "errors", {"work": work.label, "table": name, "error": message(error)}, key)
            print(f"{key} failed: {message(error)}", file=sys.stderr, flush=True)
        recorder.put("modes_gpu", "load", load.report())
        gc.collect()
        timer.release()
    return failed


def main() -> int:
    options = gpu_arguments(__doc__).parse_args()
    if options.rehearse:
        torch.compiler.set_stance("force_eager")  # the slow peers are slow because they compile
    return run_alone(run, options, slow_peers=True)


if __name__ == "__main__":
    sys.exit(main())
