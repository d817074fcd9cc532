"""Time of a step on the GPU in each mode of 16-bit training and with clipping, beside the peers that offer it.

The tables of common/modes.py. A ratio is the median over rounds of a time over that of the table's first peer in the
same round. Peers that compile for long come last, on the first work only, so that they can cost no other row. The
results are written anew after each table.
"""

import gc
import sys
import time

import torch

from ..common.cases import backends_for
from ..common.machine import Load
from ..common.modes import TABLES, Ours, Theirs
from ..common.peers import table as table_of_peers
from ..common.results import gpu_arguments, write_gpu
from ..common.rounds import Variant, interleave, message
from ..common.shapes import WORK, Work, encoder
from ..common.tensors import Tensors, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copy_bandwidth, make_timer
from ..common.variants import gpu_rows, show

WORKS = (
    WORK["xlmr_large"],
    Work("25 layers", lambda: encoder(100_000_000), lambda: encoder(1)[:32]),
)
LATER = f"compiles for long: measured last, on {WORKS[0].label} only"


def theirs(row: Theirs, tensors: Tensors, mode: str, slow: bool, timer) -> Variant:
    if row.peer.slow_start and not slow:
        return Variant(row.peer.name, "peer", error=LATER)
    return row.variant(tensors, mode, timer)


def measure(work: Work, name: str, slow: bool, copy: dict, timer: GpuTimer | RehearsalTimer, deadline: float) -> dict:
    """Measures one table. ``slow``: only the peers that compile for long, and the baseline; else all others."""
    table = TABLES[name]
    tensors = make_tensors(work.small() if timer.rehearsal else work.tensors(), table.mode, timer.device)
    backends = backends_for(timer.device, table.mode)
    baseline, *others = (row for row in table.rows if isinstance(row, Theirs))
    rows = [baseline, *(row for row in others if row.peer.slow_start or not slow)]
    variants = [theirs(row, tensors, table.mode, slow, timer) for row in rows]
    if not slow:
        own = [row for row in table.rows if isinstance(row, Ours)]
        variants[1:1] = [row.variant(tensors, backend, timer) for row in own for backend in backends]
    interleave(variants, timer, deadline, 2 if timer.rehearsal else 12, 2 if timer.rehearsal else 150)
    config = {"table": name, "work": work.label, "mode": table.mode, "numel": tensors.numel}
    config |= {"tensors": len(tensors.named), "backends": backends, "copy": copy}
    return config | {"rows": gpu_rows(variants, tensors.numel, copy["gb_per_s"])}


def replace_rows(config: dict, later: dict) -> None:
    """Replaces the rows that say that they are measured later by these."""
    found = {row["name"]: row for row in later["rows"][1:]}
    config["rows"] = [found.get(row["name"], row) for row in config["rows"]]


def main() -> int:
    parser = gpu_arguments(__doc__)
    options = parser.parse_args()
    timer, load, began = make_timer(options.rehearse), Load(), time.monotonic()
    if options.rehearse:
        torch.compiler.set_stance("force_eager")  # the slow peers are slow because they compile
    plans = [(work, name, False) for work in WORKS for name in TABLES]
    in_tables = {name: [row.peer for row in table.rows if isinstance(row, Theirs)] for name, table in TABLES.items()}
    plans += [(WORKS[0], name, True) for name, peers in in_tables.items() if any(peer.slow_start for peer in peers)]
    copy, configs, errors = copy_bandwidth(timer), {}, []
    peers = table_of_peers(peer for peers in in_tables.values() for peer in peers)
    for number, (work, name, slow) in enumerate(plans, 1):
        deadline = began + options.budget * number / len(plans)
        try:
            config = measure(work, name, slow, copy, timer, deadline)
            show({**config, "work": f"{work.label}, {name}"}, began)
            if slow:
                replace_rows(configs[work.label, name], config)
            else:
                configs[work.label, name] = config
        except Exception as error:  # such as out of memory; the next may be smaller
            errors.append({"work": work.label, "table": name, "error": message(error)})
            print(f"{work.label}, {name} left out: {errors[-1]['error']}", file=sys.stderr, flush=True)
        results = {"load": load.report(), "peers": peers, "configs": list(configs.values()), "errors": errors}
        path = write_gpu("modes_gpu", options, results)
        gc.collect()
        timer.release()
    print(path, flush=True)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
