"""What a step costs the host, what it launches, and whether a CUDA graph can replay it.

Host time: `time.perf_counter` around step() on 400 small tensors, the GPU idle before, nothing waited for after: what
Python, the tables and the launches take. With fixed addresses the gradients stay where they are, with moving ones
every step finds them elsewhere, as after `zero_grad(set_to_none=True)`.
Launches and synchronisations are counted by torch's profiler; besides, the step runs while torch refuses to
synchronise. A captured step is replayed beside the same steps made eagerly: every bit has to be the same.
"""

import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.autograd import DeviceType

from ..common.cases import CASE, HYPERS, backends_for, make_optimizer
from ..common.machine import Load
from ..common.peers import BASELINE, PEERS, Made
from ..common.results import gpu_arguments
from ..common.rounds import QUARTILES, Variant, interleave, message, nothing, spread
from ..common.rows import Recorder
from ..common.shapes import Named
from ..common.tensors import Tensors, make_tensors
from ..common.timers import GpuTimer, HostTimer, RehearsalTimer
from .alone import run_alone

TENSORS, NUMEL = 400, 1000
HOST_CASES = ("mask=None", "GradDrop", "GradDropEpoch, recomputed", "LayerGradDrop", "GradFreeze, half frozen")
GRAPH_CASES = (*HOST_CASES[:4], "GaussianGradDrop", "FixedMask, 50 %")
GRAD_SETS = 4
REPLAYS = 3
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch(Cooperative)?Kernel")
_COPY = re.compile(r"(cuda|cu|hip)Mem(cpy|set)")
_SYNCHRONIZE = re.compile(r"(cuda|cu|hip)\w*Synchronize")


def small_tensors(rehearsal: bool) -> list[Named]:
    """Makes tensors, 16 per block as in XLM-R."""
    count = 32 if rehearsal else TENSORS
    return [(f"encoder.layer.{i // 16}.weight{i % 16}", f"encoder.layer.{i // 16}", (NUMEL,)) for i in range(count)]


def steps_to_time(tensors: Tensors, device: torch.device) -> list[tuple[str, str | None, Callable[[], Made]]]:
    """Returns (name, backend, () -> step and what to do after it) of everything that is measured here."""
    names = (BASELINE.name, "torch foreach", "eager mask + torch fused", "foreach mask + torch fused")
    made = [(peer.name, None, functools.partial(peer.make, tensors, HYPERS)) for peer in PEERS if peer.name in names]
    for backend in backends_for(device, "float32"):
        for name in HOST_CASES:
            made.append((name, backend, functools.partial(our_step, name, tensors, backend)))
    return made


def our_step(name: str, tensors: Tensors, backend: str) -> Made:
    optimizer = make_optimizer(CASE[name], tensors, backend)
    CASE[name].enter_last_epoch(optimizer)
    return optimizer.step, nothing


def host_times(timer: GpuTimer | RehearsalTimer, seconds: float) -> Iterator[dict]:
    """Yields rows by name, backend and whether addresses move."""
    tensors = make_tensors(small_tensors(timer.rehearsal), "float32", timer.device)
    grads = [[torch.randn_like(param).mul_(1e-3) for param in tensors.params] for _ in range(GRAD_SETS)]
    variants = []

    def moves() -> Callable[[], None]:
        turn = itertools.cycle(grads)  # per variant, so that none finds the gradients at its last addresses

        def move() -> None:
            for param, grad in zip(tensors.params, next(turn)):
                param.grad = grad

        return move

    for name, backend, make in steps_to_time(tensors, timer.device):
        try:
            step, after = make()
            step()
            timer.synchronize()
            variants.append(Variant(name, "", step, backend, after=after))
        except Exception as error:
            timer.synchronize()
            yield {"name": name, "backend": backend, "moving": None, "error": message(error)}
    for moving in (False, True):
        again = [replace(variant, before=moves() if moving else nothing) for variant in variants]
        rounds = (2, 2) if timer.rehearsal else (2, 500)
        interleave(again, HostTimer(timer.device), time.monotonic() + seconds / 2, *rounds)
        timer.synchronize()
        for variant in again:
            row = {"name": variant.name, "backend": variant.by, "moving": moving, "tensors": len(tensors.named)}
            if variant.error or not variant.samples:
                yield row | {"error": variant.error or "no round"}
                continue
            yield row | {"rounds": len(variant.samples)} | spread("seconds", variant.seconds, QUARTILES)


def count_launches(step: Callable[[], object], timer: GpuTimer | RehearsalTimer) -> dict:
    """Counts the kernels, copies and synchronisations that one warm step asks the driver for."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not timer.rehearsal:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    timer.synchronize()
    for _ in range(2):  # the first profile also counts the profiler's own start
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("one step"):
                step()
            timer.synchronize()
    events = list(profile.events())
    on_host = [event for event in events if event.device_type == DeviceType.CPU]  # not the GPU's own "one step"
    span = next(event.time_range for event in on_host if event.name == "one step")
    names = [event.name for event in on_host if span.start <= event.time_range.start <= span.end]
    return {
        "launches": sum(bool(_LAUNCH.match(name)) for name in names),
        "copies": sum(bool(_COPY.match(name)) for name in names),
        "synchronizations": sum(bool(_SYNCHRONIZE.match(name)) for name in names),
    }


def refused_to_synchronize(step: Callable[[], object], timer: GpuTimer | RehearsalTimer) -> str | None:
    """Runs a step while torch raises at any synchronisation. Returns None, or what was raised."""
    if timer.rehearsal:
        step()
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def launches(timer: GpuTimer | RehearsalTimer) -> Iterator[dict]:
    tensors = make_tensors(small_tensors(timer.rehearsal), "float32", timer.device)
    for name, backend, make in steps_to_time(tensors, timer.device):
        row = {"name": name, "backend": backend, "tensors": len(tensors.named)}
        try:
            step, _ = make()
            row |= count_launches(step, timer)
            row["refused"] = refused_to_synchronize(step, timer)
        except Exception as error:
            timer.synchronize()
            row["error"] = message(error)
        yield row


def graphs(timer: GpuTimer | RehearsalTimer) -> Iterator[dict]:
    for backend in backends_for(timer.device, "float32"):
        for name in GRAPH_CASES:
            yield replay_matches(name, backend, timer)


def capturable_optimizer(name: str, tensors: Tensors, backend: str):
    """Makes it with capturable=True where that is accepted. A step must be capturable without it too."""
    try:
        return make_optimizer(CASE[name], tensors, backend, capturable=True)
    except ValueError:
        return make_optimizer(CASE[name], tensors, backend)


def replay_matches(name: str, backend: str, timer: GpuTimer | RehearsalTimer) -> dict:
    """Compares one captured and replayed step with the same steps made eagerly, from equal states."""
    row = {"name": name, "backend": backend, "replays": REPLAYS}
    try:
        eager = make_tensors(small_tensors(timer.rehearsal), "float32", timer.device)
        captured = eager.twin()
        optimizers = [capturable_optimizer(name, tensors, backend) for tensors in (eager, captured)]
        for optimizer in optimizers:
            CASE[name].enter_last_epoch(optimizer)
        timer.synchronize()
        replay = timer.capture(optimizers[1].step)
        # The rehearsal's replay is the step itself.
        advance = nothing if timer.rehearsal else optimizers[1].advance_captured_step
        for _ in range(REPLAYS):
            optimizers[0].step()
            advance()
            replay()
        timer.synchronize()
        both = states(*zip(optimizers, (eager, captured)))
        differing = [key for key, left, right in both if not torch.equal(left, right)]
        capturable = optimizers[1].param_groups[0]["capturable"]
        return row | {"identical": not differing, "differing": differing[:5], "capturable": capturable}
    except Exception as error:
        timer.synchronize()  # raises if the GPU is lost
        return row | {"identical": None, "error": message(error)}


def states(left: tuple, right: tuple):
    """Returns (name, tensor, tensor) of everything that a step changes."""
    (optimizer, tensors), (other_optimizer, other) = left, right
    for (name, param), (_, twin) in zip(tensors.named, other.named):
        yield f"param of {name}", param, twin
        for key in ("step", "exp_avg", "exp_avg_sq"):
            yield f"{key} of {name}", optimizer.state[param][key], other_optimizer.state[twin][key]


def run(recorder: Recorder, timer: GpuTimer | RehearsalTimer, seconds: float) -> int:
    """Measures and checks everything. Returns how many rows have an error or a graph with other bits."""
    load, failed = Load(), 0
    recorder.begin("host_gpu", "host", "launches", "graphs", "errors")
    parts = {"host": host_times(timer, 0.6 * seconds), "launches": launches(timer), "graphs": graphs(timer)}
    for part, rows in parts.items():
        try:
            for row in rows:
                recorder.add("host_gpu", part, row)
                failed += "error" in row or row.get("identical") is False
                print(f"{part}: {row}", flush=True)
        except Exception as error:  # it costs no other part
            timer.synchronize()  # raises if the GPU is lost
            recorder.add("host_gpu", "errors", {"part": part, "error": message(error)})
            failed += 1
        recorder.put("host_gpu", "load", load.report())
    return failed


def main() -> int:
    return run_alone(run, gpu_arguments(__doc__).parse_args())


if __name__ == "__main__":
    sys.exit(main())
