"""Time of a whole optimizer step on the CPU: every policy and instruction set, beside torch's steps and eager masks.

One process per thread count. In it all variants step the same parameters, gradients and moments in turn, in a random
order each round, so that whatever else the machine does meets all alike. A variant's ratio is the median over rounds
of its time over that of torch's unmasked fused step in the same round.
"""

import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from graddrop_kernels.backends import cpu

from ..common import bandwidth
from ..common.cases import CASE, CASES, SWEEP
from ..common.machine import Load
from ..common.peers import BASELINE, ON_CPU
from ..common.results import arguments, write
from ..common.rounds import Variant, interleave
from ..common.shapes import encoder, flat
from ..common.tensors import Tensors, make_tensors
from ..common.timers import HostTimer
from ..common.variants import cpu_rows, on_isas, ours, peer_variant
from ..render.cpu_tables import DTYPES, step_detail

TIMER = HostTimer()


def twins(tensors: Tensors, dtype: str, isa: str) -> list[Variant]:
    """Repeats two of the steps on tensors of their own. The differences of the ratios show the error of sharing, and
    noise.
    """
    found = [peer_variant(BASELINE, tensors, dtype, TIMER)]
    found += on_isas(ours(CASE["GradDrop"], tensors, dtype, "cpu", TIMER), [isa])
    return [replace(variant, name=f"{variant.name}, own tensors", kind="check") for variant in found]


def measure(layout: str, numel: int, dtype: str, isas: list[str], cases, deadline: float, quick: bool) -> dict:
    """Measures one configuration on the current number of threads."""
    load, threads = Load(), torch.get_num_threads()
    torch.manual_seed(random.randrange(2**31))
    shapes = flat(numel) if layout == "one tensor" else encoder(numel)
    tensors = make_tensors(shapes, dtype)
    variants = [peer_variant(peer, tensors, dtype, TIMER) for peer in ON_CPU]
    cpu.select_isa(isas[0])
    for case in cases:
        if layout == "layers" or not case.needs_blocks:
            variant = ours(case, tensors, dtype, "cpu", TIMER)
            if case in SWEEP:
                variants += on_isas(replace(variant, kind="sweep"), isas[:1])
            else:
                variants += on_isas(variant, isas)
    variants += twins(make_tensors(shapes, dtype), dtype, isas[0])
    rounds = (2, 2) if quick else (5, 1000)
    interleave(variants, TIMER, deadline, *rounds, 5, f"{dtype}, {layout}, {threads} threads")
    rows = cpu_rows(variants, tensors.numel)
    config = {"threads": threads, "layout": layout, "numel": tensors.numel, "tensors": len(tensors.named)}
    return config | {"isas": isas, "load": load.report(), "rows": rows}


def measure_threads(threads: int, dtype: str, isas: list[str], numel: int, seconds: float, quick: bool) -> dict:
    """Measures all configurations of one thread count, in a process of its own."""
    torch.set_num_threads(threads)
    start = time.monotonic()
    run = {"bandwidth": bandwidth.measure(threads, min(numel, 100_000_000), 3 if quick else 15), "configs": []}
    fast = [isa for isa in isas if isa != "portable"] or isas
    # (layout, parameters, instruction sets, cases, share of the time that has passed at the end)
    plans = [("layers", numel, fast, CASES + SWEEP, 0.55), ("one tensor", numel, fast, CASES, 0.95)]
    if fast != isas:  # portable is slow, hence fewer parameters
        plans.append(("layers", numel // 10, ["portable"], CASES, 1.0))
    for layout, size, on, cases, share in plans:
        config = measure(layout, size, dtype, on, cases, start + share * seconds, quick)
        run["configs"].append(config)
        print(f"\n{step_detail(dtype, run, config)}\nLoad of the machine: {config['load']}", flush=True)
    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--isas", nargs="+", choices=cpu.ISAS, help="default: all of this processor and build")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for each dtype, setup included")
    options = parser.parse_args()
    isas = options.isas or list(cpu.available_isas())
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    numel = min(options.numel, 200_000) if options.quick else options.numel
    seconds = 0 if options.quick else options.budget / len(options.threads)
    for dtype in options.dtypes:
        load, runs = Load(), []
        for threads in options.threads:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                job = pool.submit(measure_threads, threads, dtype, isas, numel, seconds, options.quick)
                runs.append(job.result())
        found = {"dtype": dtype, "budget": options.budget, "load": load.report(), "runs": runs}
        print(write(f"step_cpu_{dtype}", options, found))


if __name__ == "__main__":
    main()
