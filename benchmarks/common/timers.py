"""Three timers of a step with the same methods: for the host, for the GPU, and for a rehearsal of the GPU's benchmarks.

A sample on the GPU: read a buffer of 4 times the L2 (so that the cache holds nothing of ours and nothing dirty), spin
the GPU for longer than the host takes to queue the step, record an event, step, record an event. Between the events the
GPU then never waits for Python. This is not possible for a step that synchronises, or that queues more launches than
the driver takes: its sample says that the host was not ahead. The host's clock is used in a rehearsal only.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Step = Callable[[], object]
FIRST_LEAD = 2e-3  # seconds of spinning while the host's time is unknown
LONGEST_LEAD = 0.1
MARGIN = 1e-4


class Sample(NamedTuple):
    seconds: float
    host_seconds: float  # on the GPU until step() returned; by HostTimer the CPU time of all threads together
    ahead: bool = True  # everything was queued before the GPU began


class GpuTimer:
    """Times steps on one CUDA device, on its current stream."""

    rehearsal = strict = False
    warm_up = 3  # rounds; the first compiles code and makes tables

    def __init__(self, device: str = "cuda"):
        self.device = torch.device(device, torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self._cold = torch.ones(max(4 * self.l2_bytes, 256 << 20) // 4, device=self.device)
        self._sum = torch.zeros((), device=self.device)
        self._cycles_per_second = 0.0
        cycles = 20_000_000
        for _ in range(3):  # the first raises the clocks
            self._cycles_per_second = cycles / self._between(lambda: torch.cuda._sleep(cycles))

    def time(self, step: Step, lead: float = FIRST_LEAD) -> Sample:
        """Takes a sample. ``lead``: seconds that the GPU spins before the step, more than the host takes to queue
        it.
        """
        torch.sum(self._cold, dim=0, out=self._sum)
        torch.cuda._sleep(int(lead * self._cycles_per_second))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        step()
        host_seconds = time.perf_counter() - began
        end.record()
        ahead = not start.query()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3, host_seconds, ahead)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self, step: Step) -> int:
        """Returns the bytes that a step allocates for itself at its peak."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        """Frees the memory that torch caches, as other sizes come next."""
        torch.cuda.empty_cache()

    def capture(self, step: Step) -> Step:
        """Captures the step as a CUDA graph, which does not run it. Returns its replay."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _between(self, work: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class HostTimer:
    """Times steps by the host's clock: steps on the CPU, or the host's part of a step while the GPU works on."""

    rehearsal = False
    strict = True  # an error of a variant ends the measurement
    warm_up = 2

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")

    def time(self, step: Step, lead: float = FIRST_LEAD) -> Sample:
        self.synchronize()
        of_threads, began = time.process_time(), time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        return Sample(seconds, time.process_time() - of_threads)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, step: Step) -> int:
        return 0

    def allocated(self) -> int:
        return 0


class RehearsalTimer(HostTimer):
    """Stands for the GPU's timer on CPU tensors, by the host's clock: shows that the benchmarks run, measures
    nothing.
    """

    rehearsal = True
    strict = False
    warm_up = GpuTimer.warm_up
    l2_bytes = 1 << 10

    def peak_bytes(self, step: Step) -> int:
        step()
        return 0

    def release(self) -> None:
        pass

    def capture(self, step: Step) -> Step:
        return step


Timer = GpuTimer | HostTimer


def make_timer(rehearse: bool) -> GpuTimer | RehearsalTimer:
    """Makes the timer. Raises SystemExit if there is no GPU to measure."""
    if rehearse:
        return RehearsalTimer()
    if not torch.cuda.is_available():
        raise SystemExit("nothing to measure: torch sees no GPU; --rehearse runs everything on CPU tensors instead")
    return GpuTimer()


def longer_lead(lead: float, sample: Sample) -> float:
    """Returns the seconds to spin before the next sample, after the time that this one took on the host."""
    needed = 1.5 * sample.host_seconds + MARGIN
    return min(LONGEST_LEAD, max(0.9 * lead, needed) if sample.ahead else max(2 * lead, needed))


def copies_past_l2(set_bytes: int, l2_bytes: int, most: int = 8) -> int:
    """Returns how many sets of buffers to rotate among, so that none is still in the cache at its next turn."""
    return max(1, min(most, math.ceil(4 * l2_bytes / max(set_bytes, 1))))


def rotate(steps: list[Step]) -> Step:
    """Returns a step that takes the next set of buffers at each call."""
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def copy_bandwidth(timer: GpuTimer | RehearsalTimer, rounds: int = 15) -> dict:
    """Measures a plain copy, bytes read plus bytes written: the ceiling that steps are compared with."""
    numel = 1 << 12 if timer.rehearsal else 1 << 29
    source = torch.randn(numel, device=timer.device)
    target = torch.empty_like(source)
    seconds = [timer.time(lambda: target.copy_(source)).seconds for _ in range(rounds + 2)][2:]
    return {"bytes": 8 * numel, "rounds": rounds, "gb_per_s": 8 * numel / statistics.median(seconds) / 1e9}


class GpuClock:
    """A clock for pytest-benchmark. Only the steps run through it advance it, by their seconds on the GPU."""

    def __init__(self):
        self.now, self._lead = 0.0, FIRST_LEAD

    def __call__(self) -> float:
        return self.now

    def run(self, timer: GpuTimer | RehearsalTimer, step: Step) -> None:
        sample = timer.time(step, self._lead)
        self._lead = longer_lead(self._lead, sample)
        self.now += sample.seconds
