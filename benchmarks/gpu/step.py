"""Time of a whole optimizer step on the GPU: every policy, dtype and backend beside torch's step and other libraries'.

All variants of one configuration step the same parameters, gradients and moments in turn, in a random order each
round. A ratio is the median over rounds of a variant's time over that of torch's unmasked fused step in the same round.
Rows are written while the rounds go on.
"""

import functools
import gc
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..common.cases import CASE, CASES, FIXED, HYPERS, backends_for, make_optimizer
from ..common.machine import Load
from ..common.peers import BASELINE, PEERS, table, torch_adamw
from ..common.results import gpu_arguments
from ..common.rounds import QUARTILES, Variant, interleave, message, spread
from ..common.rows import Recorder
from ..common.shapes import WORK, Named
from ..common.tensors import MODES, Tensors, bytes_per_param, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copy_bandwidth
from ..common.variants import gpu_rows, ours, peer_variant, show
from .alone import run_alone

FIRST_STEPS = 5
WITH_FIXED = "xlmr_large"  # one work only: packing a mask on the CPU takes ten seconds for half a billion bits


def first_steps(tensors: Tensors, mode: str, backends: list[str], timer) -> list[dict]:
    """Times the first step of a fresh optimizer: moments of zeros, where IEEE division and square root take slow
    paths.
    """
    zeros = [tuple(torch.zeros_like(moment) for moment in pair) for pair in tensors.moments]
    fresh = replace(tensors, moments=zeros)
    made = [(BASELINE.name, None, lambda: torch_adamw(fresh, HYPERS, fused=True))]
    for backend in backends:
        for name in ("mask=None", "GradDrop"):
            made.append((name, backend, functools.partial(make_optimizer, CASE[name], fresh, backend)))
    rows = []
    for name, backend, make in made:
        try:
            optimizer, seconds = make(), []
            for _ in range(FIRST_STEPS + 1):  # the first compiles
                for state in optimizer.state.values():
                    for tensor in state.values():
                        tensor.zero_()
                seconds.append(timer.time(optimizer.step, 0.02).seconds)
            rows.append({"name": name, "backend": backend, **spread("seconds", seconds[1:], QUARTILES)})
        except Exception as error:
            timer.synchronize()
            rows.append({"name": name, "backend": backend, "error": message(error)})
    return rows


def all_float32(shapes: list[Named], timer: GpuTimer | RehearsalTimer) -> Variant:
    """Makes torch's step on wide tensors, or a variant with the error, such as no memory for them."""
    name = f"{BASELINE.name}, all float32"
    try:
        tensors = make_tensors(shapes, "float32", timer.device)
    except Exception as error:
        return Variant(name, "peer", error=message(error))
    return peer_variant(BASELINE, tensors, "float32", timer, name)


def measure(
    recorder: Recorder, benchmark: str, work: str, mode: str, timer: GpuTimer | RehearsalTimer, deadline: float,
    slow_peers: bool,
) -> None:  # fmt: skip
    """Measures one configuration. ``slow_peers``: only those that compile for long, and GradDrop; else all others."""
    began = time.monotonic()
    shapes = WORK[work].small() if timer.rehearsal else WORK[work].tensors()
    tensors = make_tensors(shapes, mode, timer.device)
    tensors.keep_grads(), tensors.torchs_moments  # made now, so that no variant is charged for them
    copy = copy_bandwidth(timer)
    backends = backends_for(timer.device, mode)
    variants = [peer_variant(BASELINE, tensors, mode, timer)]
    if MODES[mode][0] != MODES[mode][1]:  # torch has float32 moments only if everything is float32
        variants.append(all_float32(shapes, timer))
    for case in CASES:
        fits = (not case.needs_blocks or any(tensors.blocks)) and (case.name != FIXED or work == WITH_FIXED)
        if fits and (not slow_peers or case.name == "GradDrop"):
            variants += [ours(case, tensors, mode, backend, timer) for backend in backends]
    variants += [
        peer_variant(peer, tensors, mode, timer)
        for peer in PEERS
        if peer is not BASELINE and peer.slow_start == slow_peers and not (peer.make is None and slow_peers)
    ]
    variants.append(peer_variant(BASELINE, tensors, mode, timer, f"{BASELINE.name}, again", "check"))
    config = {"work": WORK[work].label, "mode": mode, "numel": tensors.numel, "tensors": len(tensors.named)}
    config |= {"backends": backends, "bytes_per_param": bytes_per_param(mode), "copy": copy, "first_steps": []}

    def write() -> None:
        config["rows"] = gpu_rows(variants, tensors.numel, copy["gb_per_s"])
        recorder.add(benchmark, "configs", config, mode)

    rounds = (2, 2) if timer.rehearsal else (12, 150)
    interleave(variants, timer, deadline, *rounds, so_far=write)
    write()
    show(config, began)
    if not slow_peers:
        config["first_steps"] = first_steps(tensors, mode, backends, timer)
        write()


def run(
    recorder: Recorder, timer: GpuTimer | RehearsalTimer, seconds: float, works: Iterable[str] = tuple(WORK),
    modes: Iterable[str] = tuple(MODES), slow_peers: bool = False,
) -> int:  # fmt: skip
    """Measures every work in every mode. Returns how many failed, such as for lack of memory."""
    began, failed = time.monotonic(), 0
    plans = [(work, mode) for work in works for mode in modes]
    for number, (work, mode) in enumerate(plans, 1):
        load, benchmark = Load(), f"step_gpu_{work}{'_slow_peers' if slow_peers else ''}"
        recorder.begin(benchmark, "configs", "errors")
        recorder.put(benchmark, "peers", table())
        try:
            measure(recorder, benchmark, work, mode, timer, began + seconds * number / len(plans), slow_peers)
        except Exception as error:
            failed += 1
            recorder.add(benchmark, "errors", {"work": WORK[work].label, "mode": mode, "error": message(error)}, mode)
            print(f"{work}, {mode} failed: {message(error)}", file=sys.stderr, flush=True)
        recorder.put(benchmark, "load", load.report())
        gc.collect()
        timer.release()
    return failed


def main() -> int:
    parser = gpu_arguments(__doc__)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--slow-peers", action="store_true", help="peers that compile for long: a file of their own")
    options = parser.parse_args()
    return run_alone(run, options, works=options.work, modes=options.modes, slow_peers=options.slow_peers)


if __name__ == "__main__":
    sys.exit(main())
