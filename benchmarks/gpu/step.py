"""Time of a whole optimizer step on the GPU: every policy, dtype and backend beside torch's step and other libraries'.

All variants of one configuration step the same parameters, gradients and moments in turn, in a random order each
round. A ratio is the median over rounds of a variant's time over that of torch's unmasked fused step in the same round.
The results are written anew after each configuration.
"""

import functools
import gc
import sys
import time
from dataclasses import replace

import torch

from ..common.cases import CASE, CASES, FIXED, HYPERS, backends_for, make_optimizer
from ..common.machine import Load
from ..common.peers import BASELINE, PEERS, table, torch_adamw
from ..common.results import gpu_arguments, write_gpu
from ..common.rounds import QUARTILES, interleave, message, spread
from ..common.shapes import WORK
from ..common.tensors import MODES, Tensors, bytes_per_param, make_tensors
from ..common.timers import GpuTimer, RehearsalTimer, copy_bandwidth, make_timer
from ..common.variants import gpu_rows, ours, peer_variant, show

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


def measure(work: str, mode: str, timer: GpuTimer | RehearsalTimer, deadline: float, slow_peers: bool) -> dict:
    """Measures one configuration. ``slow_peers``: only those that compile for long, and GradDrop; else all others."""
    shapes = WORK[work].small() if timer.rehearsal else WORK[work].tensors()
    tensors = make_tensors(shapes, mode, timer.device)
    tensors.keep_grads(), tensors.torchs_moments  # made now, so that no variant is charged for them
    copy = copy_bandwidth(timer)
    backends = backends_for(timer.device, mode)
    variants = [peer_variant(BASELINE, tensors, mode, timer)]
    if MODES[mode][0] != MODES[mode][1]:  # torch has float32 moments only if everything is float32
        wide = make_tensors(shapes, "float32", timer.device)
        variants.append(peer_variant(BASELINE, wide, "float32", timer, f"{BASELINE.name}, all float32"))
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
    interleave(variants, timer, deadline, 2 if timer.rehearsal else 12, 2 if timer.rehearsal else 150)
    config = {"work": WORK[work].label, "mode": mode, "numel": tensors.numel, "tensors": len(tensors.named)}
    config |= {"backends": backends, "bytes_per_param": bytes_per_param(mode), "copy": copy}
    config["rows"] = gpu_rows(variants, tensors.numel, copy["gb_per_s"])
    config["first_steps"] = [] if slow_peers else first_steps(tensors, mode, backends, timer)
    return config


def main() -> int:
    parser = gpu_arguments(__doc__)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--slow-peers", action="store_true", help="peers that compile for long: a file of their own")
    options = parser.parse_args()
    timer, began = make_timer(options.rehearse), time.monotonic()
    plans = [(work, mode) for work in options.work for mode in options.modes]
    failed = 0
    for work in options.work:
        load, configs, errors = Load(), [], []
        for mode in options.modes:
            deadline = began + options.budget * (plans.index((work, mode)) + 1) / len(plans)
            try:
                configs.append(measure(work, mode, timer, deadline, options.slow_peers))
                show(configs[-1], began)
            except Exception as error:  # such as out of memory; the next may be smaller
                errors.append({"work": WORK[work].label, "mode": mode, "error": message(error)})
                print(f"{work}, {mode} left out: {errors[-1]['error']}", file=sys.stderr, flush=True)
            results = {"load": load.report(), "peers": table(), "configs": configs, "errors": errors}
            path = write_gpu(f"step_gpu_{work}{'_slow_peers' if options.slow_peers else ''}", options, results)
            gc.collect()
            timer.release()
        failed += len(errors)
        print(path, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
