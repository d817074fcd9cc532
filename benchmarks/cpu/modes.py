"""Time of a step in each mode of 16-bit training, with clipping and with masks on the update, beside the peers that
offer it.

Each table has a baseline and its own tensors; a ratio is the median over rounds of a time over the baseline's in the
same round. Peers that are not installed are left out and named: `pip install torchao torch-optimi`.
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from graddrop_kernels.backends import cpu

from ..common.machine import Load
from ..common.modes import TABLES, Ours, Table
from ..common.peers import unavailable
from ..common.results import arguments, write
from ..common.rounds import Variant, interleave
from ..common.shapes import encoder
from ..common.tensors import Tensors, make_tensors
from ..common.timers import HostTimer
from ..common.variants import cpu_rows, on_isas


def variants_of(table: Table, tensors: Tensors, timer: HostTimer) -> list[Variant]:
    """Makes a table's variants, ours on the best instruction set."""
    found = []
    for row in table.rows:
        if isinstance(row, Ours):
            found += on_isas(row.variant(tensors, "cpu", timer), [cpu.isa()])
        elif row.on_cpu and (reason := unavailable(row.peer)):
            print(f"left out, {reason}: {row.peer.name}", file=sys.stderr)
        elif row.on_cpu:
            found.append(row.variant(tensors, table.mode, timer))
    return found


def measure(name: str, threads: int, numel: int, seconds: float, quick: bool) -> dict:
    """Measures one table on ``threads`` threads, in a process of its own."""
    torch.set_num_threads(threads)
    deadline = time.monotonic() + seconds
    torch.manual_seed(time.time_ns() % 2**31)
    table = TABLES[name]
    tensors, timer = make_tensors(encoder(numel), table.mode), HostTimer()
    load, variants = Load(), variants_of(table, tensors, timer)
    interleave(variants, timer, deadline, *((2, 2) if quick else (5, 1000)), 5, f"{name}, {threads} threads")
    rows = [
        {key: row[key] for key in ("name", "kind", "isa", "seconds", "ratio", "ratio_p20", "ratio_p80", "repetitions")}
        for row in cpu_rows(variants, tensors.numel)
    ]
    for row in rows:
        what = f"{name}, {threads} threads  {row['name']:<42}"
        print(f"{what}{row['seconds'] * 1e3:9.2f} ms{row['ratio']:8.2f}", flush=True)
    return {"table": name, "threads": threads, "numel": tensors.numel, "load": load.report(), "rows": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=360, metavar="SECONDS", help="of all tables, setup included")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    numel = min(options.numel, 200_000) if options.quick else options.numel
    seconds = 0 if options.quick else options.budget / len(options.tables) / len(options.threads)
    load, tables = Load(), []
    for threads in options.threads:
        for name in options.tables:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                tables.append(pool.submit(measure, name, threads, numel, seconds, options.quick).result())
    print(write("modes_cpu", options, {"load": load.report(), "tables": tables}))


if __name__ == "__main__":
    main()
