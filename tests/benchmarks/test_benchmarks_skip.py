"""The benchmark of skip_dropped() runs end to end, counts the FLOPs that it should, and has a table."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import run_well

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common.results import load  # noqa: E402
from benchmarks.common.timers import HostTimer  # noqa: E402
from benchmarks.cpu import skip_backward  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    run_well("cpu.skip_backward", "--quick", "--threads", 1, "--out", results / "some-machine")
    return results


@pytest.mark.slow
def test_every_method_is_measured_beside_the_dense_step(folder):
    (table,) = json.loads((folder / "some-machine" / "skip_backward.json").read_text())["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert [row["kind"] for row in rows.values()] == ["ours"] * 4 + ["peer"] * 3 + ["check"]
    dense, *_, again = rows.values()
    assert dense["ratio"] == dense["flops_ratio"] == again["flops_ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] for row in rows.values())
    assert all(0.3 < row["flops_ratio"] <= 1 for row in rows.values())
    # of the two blocks one is frozen, and the embeddings
    assert rows["BAdam-style: one block, nothing else"]["flops_ratio"] < 1


@pytest.mark.slow
def test_the_table(folder):
    found = load(folder)
    text = render.section("skip-backward", "some-machine", found)
    rows = found["some-machine"]["skip_backward"]["tables"][0]["rows"]
    for row in rows:
        share = 100 * (1 - row["flops_ratio"])
        assert f"| {row['name']} | {share:.1f} | {100 * (1 - row['ratio']):.1f} (" in text
    assert "time, 1 thread (p20 to p80)" in text and "a quick run, no measurement" in text


def test_flops_are_those_of_the_next_steps_blocks():
    """A step that drops k of the blocks saves k times the weight gradients of one: a third of its matrix products."""
    work = skip_backward.Work(2)
    optimizer = skip_backward.layer_graddrop(work, 0.5)
    step = skip_backward.variant("", "ours", work, optimizer, optimizer.skip_dropped)
    dense, found = work.flops(skip_backward.contextlib.nullcontext()), {}
    tokens = skip_backward.BATCH * skip_backward.TOKENS
    weights = sum(2 * tokens * param.numel() for param in work.blocks[0].parameters() if param.dim() == 2)
    for number in range(12):
        names = [f"roberta.encoder.layer.{i}.output.dense.weight" for i in range(2)]
        kept = sum(bool(optimizer.mask(name).any()) for name in names)
        step.run(HostTimer(), number)
        found[kept] = step.flops_of[number]
        assert all(param.requires_grad and param.grad is None for param in work.model.parameters())
        if number:  # the first is run in full
            assert found[kept] == dense - (2 - kept) * weights
    assert len(found) > 1 and all(torch.isfinite(param).all() for param in work.model.parameters())
