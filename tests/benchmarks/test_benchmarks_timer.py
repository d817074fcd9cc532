"""The GPU's timer on a simulated GPU, and the rounds in which variants are timed."""

import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common import rounds  # noqa: E402
from benchmarks.common import timers as gpu_timer  # noqa: E402
from benchmarks.common.timers import RehearsalTimer, Sample  # noqa: E402
from benchmarks.common.variants import gpu_rows  # noqa: E402
from benchmarks.render import goals  # noqa: E402

# --- the timer, on a simulated GPU ------------------------------------------------------------------------------------


class SimulatedGpu:
    """A host clock and one queue of work, in seconds. It carries work out in order, from when it is queued."""

    CLOCK = 1e9

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        self.captured: list | None = None
        self.sizes = [0, 0]  # allocated, peak
        gpu_module, simulated = torch.cuda, self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                self.at = max(simulated.free, simulated.host)

            def query(self) -> bool:
                return self.at <= simulated.host

            def synchronize(self):
                simulated.host = max(simulated.host, self.at)

            def elapsed_time(self, end) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for seconds in self.work:
                    simulated.queue(seconds)

        class capture:  # noqa: N801
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                simulated.captured = self.graph.work = []

            def __exit__(self, *_):
                simulated.captured = None

        properties = types.SimpleNamespace(L2_cache_size=1 << 20)
        replaced = {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "current_device": lambda: 0,
            "get_device_properties": lambda device: properties, "synchronize": lambda device=None: self.wait(),
            "_sleep": lambda cycles: self.queue(cycles / self.CLOCK), "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: self.sizes[0],
            "max_memory_allocated": lambda device=None: self.sizes[1],
            "reset_peak_memory_stats": lambda device=None: self.sizes.__setitem__(1, self.sizes[0]),
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(gpu_module, name, value)
        monkeypatch.setattr(gpu_timer.time, "perf_counter", lambda: self.host)

    def queue(self, seconds: float) -> None:
        if self.captured is not None:
            self.captured.append(seconds)
        else:
            self.free = max(self.free, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def step(self, host_seconds: float, gpu_seconds: float):
        """Half of the host's time before the launch, half after."""

        def step() -> None:
            self.host += host_seconds / 2
            self.queue(gpu_seconds)
            self.host += host_seconds / 2

        return step


@pytest.fixture
def simulated(monkeypatch) -> SimulatedGpu:
    return SimulatedGpu(monkeypatch)


def test_the_hosts_time_is_not_measured_when_the_gpu_is_kept_busy(simulated):
    timer = gpu_timer.GpuTimer("cpu")
    step = simulated.step(host_seconds=0.004, gpu_seconds=0.001)
    assert timer.time(step, lead=0.005) == pytest.approx((0.001, 0.004, True))
    seconds, host_seconds, ahead = timer.time(step, lead=0.0)
    # without a lead the whole of the host's 4 ms lies between the events: the launch comes after 2 ms, the work takes 1
    assert seconds == pytest.approx(0.004) and host_seconds == pytest.approx(0.004) and not ahead


def test_the_lead_grows_until_the_host_is_ahead_and_no_further(simulated):
    timer = gpu_timer.GpuTimer("cpu")
    step, lead, samples = simulated.step(host_seconds=0.02, gpu_seconds=0.001), gpu_timer.FIRST_LEAD, []
    for _ in range(8):
        samples.append(timer.time(step, lead))
        lead = gpu_timer.longer_lead(lead, samples[-1])
    assert not samples[0].ahead and all(sample.ahead for sample in samples[1:])
    assert all(sample.seconds == pytest.approx(0.001) for sample in samples[1:])
    assert lead == pytest.approx(1.5 * 0.02 + gpu_timer.MARGIN, rel=0.2)
    slow = Sample(1.0, 10.0, False)  # a step that waits for the GPU is never hidden
    assert gpu_timer.longer_lead(0.09, slow) == gpu_timer.LONGEST_LEAD


def test_a_step_that_synchronises_is_not_ahead(simulated):
    timer = gpu_timer.GpuTimer("cpu")

    def step() -> None:
        simulated.queue(0.001)
        simulated.wait()

    assert not timer.time(step, lead=0.05).ahead


def test_the_cache_is_flushed_before_every_sample(simulated, monkeypatch):
    timer, order = gpu_timer.GpuTimer("cpu"), []
    assert timer._cold.numel() * 4 >= 4 * timer.l2_bytes
    monkeypatch.setattr(torch, "sum", lambda tensor, **_: order.append("read" if tensor is timer._cold else "else"))
    timer.time(lambda: order.append("step"))
    assert order == ["read", "step"]


def test_capturing_carries_nothing_out_and_replaying_does(simulated):
    timer = gpu_timer.GpuTimer("cpu")
    before = simulated.free
    replay = timer.capture(simulated.step(0.0, 0.25))
    assert simulated.free == before
    replay(), replay()
    assert simulated.free - max(before, simulated.host) == pytest.approx(0.5)


def test_peak_bytes_are_a_steps_own(simulated):
    timer = gpu_timer.GpuTimer("cpu")
    simulated.sizes[:] = [1000, 9000]

    def step() -> None:
        simulated.sizes[1] = max(simulated.sizes[1], simulated.sizes[0] + 64)

    assert timer.peak_bytes(step) == 64 and timer.allocated() == 1000


def test_copies_pass_the_cache():
    assert gpu_timer.copies_past_l2(28 * 100_000, 60 << 20) == 8
    assert gpu_timer.copies_past_l2(100 << 20, 60 << 20) == 3 and gpu_timer.copies_past_l2(1 << 40, 60 << 20) == 1
    turns = []
    step = gpu_timer.rotate([lambda i=i: turns.append(i) for i in range(3)])
    for _ in range(5):
        step()
    assert turns == [0, 1, 2, 0, 1]


def test_the_clock_of_the_micro_suite_counts_the_gpus_seconds_only(simulated):
    timer, clock = gpu_timer.GpuTimer("cpu"), gpu_timer.GpuClock()
    readings = []
    for _ in range(4):
        clock.run(timer, simulated.step(host_seconds=0.001, gpu_seconds=0.25))
        simulated.host += 10.0
        readings.append(clock())
    assert readings == pytest.approx([0.25, 0.5, 0.75, 1.0])


# --- rounds -----------------------------------------------------------------------------------------------------------


class ListedTimer(RehearsalTimer):
    """Seconds that the steps say themselves."""

    def time(self, step, lead: float = 0.0) -> Sample:
        return Sample(step(), 0.001, True)


def listed(name: str, *seconds: float, kind: str = "ours", backend: str | None = "b", **options) -> rounds.Variant:
    """Takes these seconds in its rounds, the last of them from then on; each warm-up takes the first."""
    turn = [seconds[0]] * 4 + list(seconds)  # three rounds and the one that watches the memory
    return rounds.Variant(name, kind, lambda: turn.pop(0) if len(turn) > 1 else turn[0], backend, **options)


def run_rounds(variants: list[rounds.Variant], number: int = 4) -> list[dict]:
    rounds.interleave(variants, ListedTimer(), time.monotonic() - 1, number, number)
    return gpu_rows(variants, 1_000_000_000, 100.0)


def test_medians_quartiles_and_ratios_by_round():
    baseline = listed("torch fused", 1.0, 2.0, 4.0, 4.0, kind="peer", backend=None, moved=lambda: 28.0)
    unmasked = listed("mask=None", 1.0, 2.0, 4.0, 8.0)
    masked = listed("GradDrop", 3.0, 3.0, 6.0, 12.0, moved=lambda: 14.0)
    base, plain, row = run_rounds([baseline, unmasked, masked])
    assert (base["seconds"], base["seconds_q1"], base["seconds_q3"], base["ratio"]) == (3.0, 1.75, 4.0, 1.0)
    assert base["over_unmasked"] is None and plain["over_unmasked"] == 1
    assert (row["ratio"], row["ratio_q1"], row["ratio_q3"]) == (2.25, 1.5, 3.0)  # of 3, 1.5, 1.5, 3
    assert row["over_unmasked"] == 1.5  # of 3, 1.5, 1.5, 1.5
    assert (row["bytes_per_param"], row["gb_per_s"]) == (14.0, 14 / 4.5) and row["of_copy"] == 14 / 450
    assert row["rounds"] == 4 and row["ahead"] == 1


def test_variants_without_a_round_together_have_no_ratio():
    """Slow ones run in every second round or so, and rows are also made of the first few rounds."""
    baseline, unmasked = rounds.Variant("torch fused", "peer"), rounds.Variant("mask=None", "ours", by="cpu")
    masked, late = (rounds.Variant(name, "ours", by="cpu") for name in ("GradDrop", "LayerGradDrop"))
    for variant, numbers in ((baseline, (0, 1)), (unmasked, (0,)), (masked, (1,)), (late, ())):
        variant.samples.update({number: Sample(1.0 + number, 0.0) for number in numbers})
        variant.bytes_of.append(28.0), variant.shares.append(1.0)
    base, plain, row, none = gpu_rows([baseline, unmasked, masked, late], 1, 1.0)
    assert (base["rounds"], plain["ratio"], plain["over_unmasked"]) == (2, 1, 1)
    assert row["ratio"] == 1 and row["over_unmasked"] is None
    assert none["error"] == "no round"
    rows = [{"name": "GradDrop", "kind": "ours", "backend": "cpu", **row}]
    results = {goals.LARGE: {"configs": [{"mode": mode, "rows": rows} for mode in goals.MODES]}}
    values = {goal.text: value for goal, value, _ in goals.judge(results)}
    assert values["GradDrop, float32: mask on / mask off"] is None


def test_a_variant_that_fails_costs_its_own_row(capsys):
    def fail():
        raise RuntimeError("no kernel image\nfor this device")

    missing = rounds.Variant("apex", "peer", lambda: pytest.fail("must not run"), error="not installed")
    late = listed("late", 1.0)
    works = late.step
    late.step = lambda: works() if len(late.samples) < 5 else fail()
    rows = run_rounds([listed("torch fused", 1.0), rounds.Variant("bad", "peer", fail), missing, late], number=8)
    assert [row.get("error") for row in rows] == [
        None, "RuntimeError: no kernel image", "not installed", "RuntimeError: no kernel image"
    ]  # fmt: skip
    assert "seconds" not in rows[3] and "bad left out: RuntimeError: no kernel image" in capsys.readouterr().err


def test_no_baseline_and_a_lost_gpu_end_the_configuration():
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="no baseline: RuntimeError: out of memory"):
        run_rounds([rounds.Variant("torch fused", "peer", fail), listed("GradDrop", 1.0)])

    class Lost(ListedTimer):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        rounds.interleave([listed("a", 1.0), rounds.Variant("b", "ours", fail)], Lost(), 0, 2, 2)


def test_slow_variants_run_less_often():
    fast, slow = listed("torch fused", 1.0), listed("slow", 13.0)
    rounds.interleave([fast, slow], ListedTimer(), time.monotonic() - 1, 20, 20)
    assert list(fast.samples) == list(range(20)) and len(slow.samples) == 5  # every fourth
