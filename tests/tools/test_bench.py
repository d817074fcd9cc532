"""`bench`: the table has what was measured, and what is timed are real steps. No figure is judged."""

import math
import re
import sys

import pytest
import torch
from cases import require

from graddrop_kernels import FusedGradDropAdamW
from graddrop_kernels.tools import bench

POLICIES = (
    "mask=None", "GradFreeze, half frozen", "GradDrop", "LayerGradDrop", "GradDropEpoch", "GradDropEpoch, toggle",
    "GradDrop, every epoch", "GaussianGradDrop", "GradDropEpoch, bit-packed", "RandomMask", "FixedMask, 50 %",
)  # fmt: skip


@pytest.fixture
def counted_time(monkeypatch):
    """Time as a counter: the n-th step timed took n seconds."""
    taken = []

    def time_of(step, device):
        step()
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
    assert len(counted_time) == 3 * 3 * (2 + len(POLICIES))
    assert f"torch {torch.__version__}" in lines[0]
    assert "QUICK RUN" in output.out and "bfloat16: 3 rounds" in output.err


def test_ratios_are_taken_round_by_round(monkeypatch):
    """torch takes 2 s in the first round and 1 s later, GradDrop always 3: the median ratio is 3, not 3 / 1.33."""
    require("cpu")
    calls = {}

    def time_of(step, device):
        number = calls[step] = calls.get(step, 0) + 1
        of_torch = not isinstance(getattr(step, "__self__", None), FusedGradDropAdamW)
        return (2.0 if number == 1 else 1.0) if of_torch else 3.0

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
