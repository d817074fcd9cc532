"""`bench`: the table has what was measured, and what is timed are real steps. No figure is judged."""

import math
import re
import sys
from contextlib import contextmanager

import pytest
import torch
from cases import require

from graddrop_kernels import FusedGradDropAdamW
from graddrop_kernels.tools import bench

POLICIES = (
    "mask=None", "GradFreeze, half frozen", "GradDrop", "LayerGradDrop", "GradDropEpoch", "GradDropEpoch, toggle",
    "GradDrop, every epoch", "GaussianGradDrop", "GradDropEpoch, bit-packed", "RandomMask", "SkipUpdate",
    "FixedMask, 50 %",
)  # fmt: skip


@pytest.fixture
def counted_time(monkeypatch):
    """Time as a counter: the n-th step timed took n seconds."""
    taken = []

    def time_of(entry, device):
        entry.step()
        taken.append(1.0 + len(taken))
        return taken[-1]

    monkeypatch.setattr(bench, "_time", time_of)
    return taken


def test_quick_run_on_the_cpu(capsys, monkeypatch, counted_time):
    """Needs no matplotlib."""
    require("cpu")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    measured, measure = [], bench._measure
    monkeypatch.setattr(bench, "_measure", lambda *arguments: measured.append(measure(*arguments)) or measured[-1])
    assert bench.bench("cpu", quick=True) == 0
    output = capsys.readouterr()
    assert [mode["mode"] for mode in measured] == ["float32", "bfloat16, float32 moments", "bfloat16"]
    names = ["torch fused", "mask drawn by torch, torch fused", *POLICIES]
    for mode in measured:
        assert mode["backend"] == "cpu" and mode["tensors"] == 32 and mode["rounds"] == 3
        assert [row["name"] for row in mode["rows"]] == names and mode["rows"][0]["ratio"] == 1
    lines = output.out.splitlines()
    for number, name in enumerate(names):
        (line,) = (line for line in lines if line.startswith(f"{name}  "))
        own = [mode["rows"][number] for mode in measured]
        cells = [f"{row['ratio']:.2f} ({row['seconds'] * 1e3:.3f})" for row in own]
        assert re.split(r"  +", line)[1:] == cells, line
    assert len(counted_time) == 3 * (2 + 3) * (2 + len(POLICIES))  # two rounds to warm up
    assert f"torch {torch.__version__}" in lines[0]
    assert "QUICK RUN" in output.out and "bfloat16: 3 rounds" in output.err


def test_ratios_are_taken_round_by_round(monkeypatch):
    """torch takes 2 s in the first round and 1 s later, GradDrop always 3: the median ratio is 3, not 3 / 1.33."""
    require("cpu")
    calls = {}

    def time_of(entry, device):
        number = calls[entry.name] = calls.get(entry.name, 0) + 1
        of_torch = not isinstance(getattr(entry.step, "__self__", None), FusedGradDropAdamW)
        return (2.0 if number == 3 else 1.0) if of_torch else 3.0  # 1 and 2 are not counted

    monkeypatch.setattr(bench, "_time", time_of)
    measured = bench._measure("float32", "cpu", torch.device("cpu"), "quick")
    ratios = {row["name"]: row["ratio"] for row in measured["rows"]}
    assert ratios["GradDrop"] == 3 and ratios["mask drawn by torch, torch fused"] == 1


@pytest.mark.parametrize("mode", bench._MODES)
def test_every_entry_steps_the_shared_tensors_from_warm_state(mode, seed):
    require("cpu")
    torch.manual_seed(seed)
    tensors = bench._make_tensors(mode, torch.device("cpu"), 2, 32)
    dtype, moment_dtype = bench._MODES[mode]
    assert all(moment.dtype == moment_dtype and moment.count_nonzero() for pair in tensors.moments for moment in pair)
    grads = [param.grad.clone() for _, param in tensors.named]
    for entry in bench._entries(tensors, mode, "cpu"):
        for _, param in tensors.named:
            assert param.dtype == param.grad.dtype == dtype
            param.data.normal_()  # large beside an update of 1e-6 in bfloat16, so the moments show the step
        before = [moment.clone() for pair in tensors.moments for moment in pair]
        entry.step()
        after = [moment for pair in tensors.moments for moment in pair]
        moved = sum(not torch.equal(old, new) for old, new in zip(before, after))
        keeps_own_moments = entry.name in (bench._BASELINE, bench._EAGER) and dtype != moment_dtype
        assert moved == 0 if keeps_own_moments else moved >= len(after) / 3, entry.name
        entry.after()
        assert all(torch.equal(param.grad, grad) for (_, param), grad in zip(tensors.named, grads)), entry.name


def test_the_mask_by_hand_drops_and_rescales(seed):
    torch.manual_seed(seed)
    require("cpu")
    tensors = bench._make_tensors("float32", torch.device("cpu"), 2, 64)
    before = torch.cat([param.grad.flatten() for _, param in tensors.named])
    by_hand = next(entry for entry in bench._entries(tensors, "float32", "cpu") if entry.name == bench._EAGER)
    by_hand.step()
    masked = torch.cat([param.grad.flatten() for _, param in tensors.named])
    kept = masked != 0
    assert abs(kept.double().mean().item() - 0.8) < 6 * math.sqrt(0.2 * 0.8 / kept.numel())
    torch.testing.assert_close(masked[kept], before[kept] / 0.8)


def test_without_a_fast_backend_it_says_why_and_fails(capsys, monkeypatch):
    rows = {row.name: row for row in bench.backends.BACKENDS}
    monkeypatch.setattr(bench.backends, "select", lambda *arguments: rows["reference"])
    assert bench.bench("cpu", quick=True) == 1
    output = capsys.readouterr()
    assert re.match(r"nothing to measure on cpu: .*cpu", output.err) and not output.out


class SimulatedGpus:
    """Two GPUs, each with a queue of work in seconds beside the host's clock. Work goes to the current one."""

    CLOCK = 1e9

    def __init__(self, monkeypatch):
        self.current, self.host, self.free, self.spun = 0, 0.0, [0.0, 0.0], []
        simulated = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.device, self.at = simulated.current, max(simulated.free[simulated.current], simulated.host)

            def synchronize(self):
                simulated.host = max(simulated.host, self.at)

            def elapsed_time(self, end):
                assert self.device == end.device
                return (end.at - self.at) * 1e3

        @contextmanager
        def device(chosen):
            before, self.current = self.current, chosen.index
            yield
            self.current = before

        replaced = {
            "Event": Event, "device": device, "current_device": lambda: self.current, "_sleep": self.spin,
            "is_available": lambda: True, "get_device_name": lambda device: "simulated",
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.host)
        bench._cycles_per_second.cache_clear()

    def work(self, seconds, device=None):
        device = self.current if device is None else device
        self.free[device] = max(self.free[device], self.host) + seconds

    def spin(self, cycles):
        self.spun.append(cycles / self.CLOCK)
        self.work(cycles / self.CLOCK)


def test_all_of_a_measurement_is_on_the_gpu_that_was_asked_for(monkeypatch, capsys):
    """torch's own launches follow the tensors; the spinning and the events follow the current device."""
    gpus = SimulatedGpus(monkeypatch)
    seen = []

    def measured(mode, backend, device, kind):
        entry = bench._Entry("a step", lambda: gpus.work(3e-3, device=1))
        seen.append((mode, device, gpus.current, bench._time(entry, device)))
        return {"mode": mode}

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr(bench, "_table", lambda found: "")
    monkeypatch.setattr(bench.backends, "select", lambda *arguments: bench.backends.BACKENDS[1])
    assert bench.bench("cuda:1") == 0
    second = torch.device("cuda:1")
    assert [each[:3] for each in seen] == [(mode, second, 1) for mode in bench._MODES]
    assert all(seconds == pytest.approx(3e-3) for *_, seconds in seen) and gpus.current == 0
    assert gpus.free[0] == 0
    bench.bench("cuda")
    assert seen[-1][1:3] == (torch.device("cuda:0"), 0)


@pytest.mark.parametrize("on_host", [20e-6, 15e-3, 1.0])
def test_the_gpu_spins_for_longer_than_the_host_needs(on_host, monkeypatch):
    """Else what is timed is the host: 1500 launches of a step by hand take it longer than any fixed time. At most
    0.1 s, as the driver takes a thousand launches and then lets the host wait for the spinning.
    """
    gpus = SimulatedGpus(monkeypatch)
    gpus.current, device = 1, torch.device("cuda:1")
    entry = bench._Entry("a step", lambda: setattr(gpus, "host", gpus.host + on_host) or gpus.work(2e-3))
    seconds = [bench._time(entry, device) for _ in range(3)]
    assert entry.spin == pytest.approx(min(0.1, 1.5 * on_host + 1e-4)) == pytest.approx(gpus.spun[-1], rel=1e-3)
    if on_host < 0.1:
        assert seconds[1:] == pytest.approx([2e-3, 2e-3])  # and not the host's time besides
