"""Sweeps of the XGLUE benchmark: choice of the rate, interruption and resume, failures, shared folders, studies."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lazy import Lazy

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.xglue.__main__ import main  # noqa: E402
from benchmarks.xglue.arguments import methods_of, seeds_of  # noqa: E402
from benchmarks.xglue.methods import PAPERS  # noqa: E402
from benchmarks.xglue.runs import study  # noqa: E402
from benchmarks.xglue.runs.lock import claim  # noqa: E402
from benchmarks.xglue.runs.sweep import Plan, deal_gpus, work  # noqa: E402
from benchmarks.xglue.settings import settings_for  # noqa: E402

OPTIONS = {"device": "cpu", "checkpoints": False, "progress": False}


def plan(**more) -> Plan:
    base = settings_for(
        "sib200", "tiny", languages=("en", "sw"), train_examples=16, eval_examples=4, epochs=1, max_length=32,
        precision="float32",
    )  # fmt: skip
    return Plan(base, **{
        "methods": ("sft", "graddrop"), "seeds": (0, 1, 2), "lrs": (1e-3, 2e-3), "tuning_seeds": (0, 1), **more
    })  # fmt: skip


def pretend(results, settings, dev):
    """A result with this English dev score."""
    path = results / settings.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "best_epoch": 1, "dev": {"1": {"en": {"official": dev}}}}))


def found(results):
    return {path.stem: path.stat().st_mtime_ns for path in results.glob("sib200/*/*.json")}


@pytest.fixture
def counted(monkeypatch):
    """``run_one`` only writes what the rate 2e-3 does better at for graddrop, 1e-3 for sft; the list of its runs."""
    runs = []

    def run_one(settings, results, **options):
        assert options == OPTIONS
        runs.append(settings)
        pretend(results, settings, 0.6 if (settings.lr == 2e-3) is (settings.method == "graddrop") else 0.5)

    monkeypatch.setattr("benchmarks.xglue.runs.run.run_one", run_one)
    return runs


def test_the_grid_first_then_every_seed_at_the_best_rate(counted, tmp_path):
    whole = plan()
    assert work(whole, tmp_path, OPTIONS) == []
    assert [(s.method, s.seed, s.lr) for s in counted[:8]] == [(s.method, s.seed, s.lr) for s in whole.tuning()]
    assert [(s.method, s.seed, s.lr) for s in counted[8:]] == [("sft", 2, 1e-3), ("graddrop", 2, 2e-3)]
    assert len(counted) == whole.total() == len(set(counted)) == 10
    assert work(whole, tmp_path, OPTIONS) == [] and len(counted) == 10


def test_one_rate_needs_no_grid(counted, tmp_path):
    work(plan(lrs=(5e-4,)), tmp_path, OPTIONS)
    expected = [(seed, method, 5e-4) for seed in range(3) for method in ("sft", "graddrop")]
    assert [(s.seed, s.method, s.lr) for s in counted] == expected


def test_stopped_at_any_run_it_goes_on_there(counted, tmp_path):
    for stop in (1, 4, 9):
        asked = iter([True] * (stop - len(counted)) + [False])
        work(plan(), tmp_path, OPTIONS, go_on=lambda asked=asked: next(asked))
        assert len(counted) == stop
    before = found(tmp_path)
    work(plan(), tmp_path, OPTIONS)
    assert len(counted) == len(set(counted)) == 10 and found(tmp_path).items() >= before.items()


def test_a_failed_run_loses_nothing_else_and_is_tried_again_by_the_next_sweep(counted, tmp_path, monkeypatch, capsys):
    bad = replace(plan().base, method="graddrop", seed=1, lr=1e-3)
    fine, broken = Lazy("benchmarks.xglue.runs.run").run_one, [True]

    def run_one(settings, results, **options):
        if settings == bad and broken:
            raise RuntimeError("out of memory, say")
        fine(settings, results, **options)

    monkeypatch.setattr("benchmarks.xglue.runs.run.run_one", run_one)
    assert work(plan(), tmp_path, OPTIONS) == [bad]
    assert len(counted) == 8  # 7 of the grid, sft's third seed; graddrop has no rate yet
    failure = (tmp_path / bad.file).with_suffix(".failed.txt")
    assert "out of memory, say" in failure.read_text() and "graddrop-lr0.001-seed1" in capsys.readouterr().err
    broken.clear()
    assert work(plan(), tmp_path, OPTIONS, started=time.time() + 1) == []
    assert len(counted) == 10 and not failure.exists()


def test_a_run_that_another_sweep_does_is_left_to_it(counted, tmp_path):
    only = plan(methods=("sft",), lrs=(1e-3,), seeds=(0, 1))
    theirs = only.runs(tmp_path)[0]
    path = tmp_path / theirs.file
    with claim(path.with_suffix(".lock")) as mine:
        assert mine
        asked = iter([True, True, True, False])
        work(only, tmp_path, OPTIONS, go_on=lambda: next(asked))
        assert [settings.seed for settings in counted] == [1]
    pretend(tmp_path, theirs, 0.5)
    assert work(only, tmp_path, OPTIONS) == [] and len(counted) == 1
    assert not list(tmp_path.glob("sib200/*/*.lock"))


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "a.lock"
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    code += f"from benchmarks.xglue.runs.lock import claim\nwith claim(Path({str(path)!r})):\n print(1, flush=True)\n"
    process = subprocess.Popen([sys.executable, "-c", code + " time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    with claim(path) as mine:
        assert not mine
    process.kill()
    process.wait()
    process.stdout.close()
    with claim(path) as mine:
        assert mine


@pytest.mark.slow
def test_a_sweep_killed_and_resumed_with_workers(tmp_path):
    """Two processes; the sweep is ended when it has a result, and does the rest when started again."""
    flags = [
        "sweep", "--task", "sib200", "--model", "tiny", "--methods", "sft", "graddrop-epoch", "--seeds", "0..3",
        "--lrs", "0.001", "0.003", "--tuning-seeds", "0", "--languages", "en", "sw", "--train-examples", "16",
        "--eval-examples", "4", "--epochs", "2", "--max-length", "32", "--float32", "--device", "cpu",
        "--no-checkpoints", "--threads", "1", "--results", tmp_path,
    ]  # fmt: skip
    flags = list(map(str, flags))
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.xglue", *flags], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not found(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    error = process.communicate()[1].decode()
    before = found(tmp_path)
    assert 0 < len(before) < 10, error
    assert main([*flags, "--workers", "2"]) == 0
    after = found(tmp_path)
    assert len(after) == 10 and after.items() >= before.items()
    for path in tmp_path.glob("sib200/*/*"):
        assert path.suffix == ".json", path
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "| SFT |" in (tmp_path / "out" / "report.md").read_text()


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert deal_gpus(3, None) == ["0", "1", "0"] and deal_gpus(2, "cpu") == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert deal_gpus(3, None) == ["5", "3", "5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert deal_gpus(2, None) == [None, None]


def test_seeds_and_methods():
    assert seeds_of(["0..2", "7", "1"]) == (0, 1, 2, 7) and methods_of(["all"]) == tuple(PAPERS)
    for words in (["x"], ["3..1"], ["-1"]):
        with pytest.raises(ValueError, match="seed"):
            seeds_of(words)


def test_bad_sweeps_are_refused(tmp_path, capsys):
    common = ["--task", "sib200", "--model", "tiny", "--results", str(tmp_path)]
    for words, said in ((["--methods", "sft", "nope"], "--method nope"), (["--lrs", "0"], "--lr 0.0"),
                        (["--seeds", "a"], "seed a"), (["--workers", "0"], "--workers 0")):  # fmt: skip
        assert main(["sweep", *common, *words]) == 1 and said in capsys.readouterr().err
    assert main(["study", "no-such"]) == 1 and "no study no-such" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_our_studies_can_be_run(tmp_path):
    for path in study.FOLDER.glob("*.json"):
        for one in study.plans(path.stem):
            assert one.possible() and one.total() > 0
    bad = tmp_path / "bad.json"
    bad.write_text('{"sweeps": [{"task": "sib200", "epoch": 3}]}')
    with pytest.raises(ValueError, match="unknown setting epoch"):
        study.plans(str(bad))
