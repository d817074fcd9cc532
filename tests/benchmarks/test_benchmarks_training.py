"""The benchmark of whole training runs: every method is measured in a process of its own, by turns."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
from test_benchmarks import run_well

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.cpu import training  # noqa: E402
from benchmarks.render import beyond_tables  # noqa: E402


@pytest.mark.slow
def test_every_method_is_measured(tmp_path):
    pytest.importorskip("peft")
    run_well("cpu.training", "--quick", "--out", tmp_path)
    rows = {row["method"]: row for row in json.loads((tmp_path / "training.json").read_text())["rows"]}
    assert list(rows) == [
        "sft", "lora", "sample-blocks", "cycle-blocks", "random-mask", "gradfreeze-topdown", "sft, again"
    ]  # fmt: skip
    assert all(row["steps"] == 6 and row["seconds"] > 0 for row in rows.values())  # 24 sentences, three epochs
    assert rows["sft"]["ratio"] == rows["sft"]["peak_ratio"] == 1
    full = rows["sft"]["trained"]
    assert {name for name, row in rows.items() if row["trained"] < full} == {"lora"}
    assert set(rows) - {"sft, again"} == set(beyond_tables.NAMES) | {"sample-blocks", "cycle-blocks", "random-mask"}


def test_what_is_trained_is_what_the_study_trains():
    found = training.settings_of(quick=False)
    plans = training.plans(training.STUDY)
    for settings in found.values():
        assert all(settings.configuration == plan.base.configuration for plan in plans)
    others = {"sft", "gradfreeze-topdown", "sft, again"}
    assert {name for plan in plans for name in plan.methods} == found.keys() - others
    assert found["sft, again"] == found["sft"] and {settings.seed for settings in found.values()} == {0}


def answers(own: list[float], turns) -> None:
    for seconds in own:
        turns.recv()
        turns.send(seconds)
    turns.recv()
    turns.send({"peak_bytes": int(own[0] * 100)})


def test_turns_are_taken_step_by_step():
    """The ratio is of all steps together, 7 / 4, not the median of 1."""
    turns, processes = {}, []
    context = multiprocessing.get_context("fork")
    for name, own in {"full": [1.0, 2.0, 1.0], "other": [4.0, 2.0, 1.0]}.items():
        turns[name], theirs = context.Pipe()
        processes.append(context.Process(target=answers, args=(own, theirs)))
        processes[-1].start()
    seconds, measured = training.take_turns(turns)
    for process in processes:
        process.join()
    assert seconds == {"full": [1.0, 2.0, 1.0], "other": [4.0, 2.0, 1.0]}
    first, second = training.rows_of(seconds, measured)
    assert (first["ratio"], second["ratio"], second["peak_ratio"]) == (1, 7 / 4, 4)
    assert second["ratio_p20"] == 1 and second["steps"] == 3
