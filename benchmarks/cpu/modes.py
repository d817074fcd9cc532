"""Time of a step in each mode of 16-bit training and with clipping, beside the peers that offer it.

Each table has a baseline and its own tensors; a ratio is the median over rounds of a time over the baseline's in the
same round. Peers that are not installed are left out and named: `pip install torchao torch-optimi`.
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from graddrop_kernels.backends import cpu

from ..common import machine
from ..common.modes import TABLES, Ours, Table
from ..common.peers import unavailable
from ..gpu.step import MODES, GpuTensors, make_tensors
from .step import HYPERS, Variant, encoder_shapes, interleave, summarize, width


def variants_of(table: Table, tensors: GpuTensors) -> list[Variant]:
    """Ours on the best instruction set."""
    found = []
    for row in table.rows:
        if isinstance(row, Ours):
            found.append(Variant(row.name, "ours", row.optimizer(tensors, "cpu").step, cpu.isa()))
        elif row.on_cpu and (reason := unavailable(row.peer)):
            print(f"left out, {reason}: {row.peer.name}", file=sys.stderr)
        elif row.on_cpu:
            step, after = row.peer.make(tensors, HYPERS)
            found.append(Variant(row.peer.name, "peer", step, after=after))
    return found


def measure(name: str, threads: int, numel: int, seconds: float, quick: bool) -> dict:
    """One table on so many threads: called in a process of its own."""
    torch.set_num_threads(threads)
    deadline = time.monotonic() + seconds
    torch.manual_seed(time.time_ns() % 2**31)
    table = TABLES[name]
    tensors = make_tensors(encoder_shapes(width(numel)), table.mode, torch.device("cpu"))
    load, variants = machine.Load(), variants_of(table, tensors)
    interleave(variants, deadline, *((2, 2) if quick else (5, 1000)), f"{name}, {threads} threads")
    rows = [
        {key: row[key] for key in ("name", "kind", "isa", "seconds", "ratio", "ratio_p20", "ratio_p80", "repetitions")}
        for row in summarize(variants, tensors.numel, MODES[table.mode][0].itemsize)
    ]
    for row in rows:
        what = f"{name}, {threads} threads  {row['name']:<42}"
        print(f"{what}{row['seconds'] * 1e3:9.2f} ms{row['ratio']:8.2f}", flush=True)
    return {"table": name, "threads": threads, "numel": tensors.numel, "load": load.report(), "rows": rows}


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=360, metavar="SECONDS", help="of all tables, setup included")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    numel = min(options.numel, 200_000) if options.quick else options.numel
    seconds = 0 if options.quick else options.budget / len(TABLES) / len(options.threads)
    load, tables = machine.Load(), []
    for threads in options.threads:
        for name in TABLES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                tables.append(pool.submit(measure, name, threads, numel, seconds, options.quick).result())
    print(machine.write("modes_cpu", options, {"load": load.report(), "tables": tables}))


if __name__ == "__main__":
    main()
