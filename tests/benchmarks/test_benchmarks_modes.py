"""The benchmarks of 16-bit training and of clipping run end to end; tables and figures hold what they found."""

import json
import sys
from pathlib import Path

import pytest
from cases import require
from test_benchmarks import run_well

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common import modes  # noqa: E402
from benchmarks.common.results import load  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402
from benchmarks.render import cpu_figures  # noqa: E402
from graddrop_kernels.demo.methods import WEIGHTS  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    require("cpu")
    results = tmp_path_factory.mktemp("results")
    run_well("cpu.modes", "--quick", "--threads", 1, "--out", results / "some-machine")
    run_well("cpu.precision", "--quick", "--out", results / "some-machine")
    return results


def read(folder, name):
    return json.loads((folder / "some-machine" / f"{name}.json").read_text())


def test_every_mode_is_measured_beside_its_peers(folder):
    tables = {table["table"]: table["rows"] for table in read(folder, "modes_cpu")["tables"]}
    assert tables.keys() == modes.TABLES.keys()
    for rows in tables.values():
        assert rows[0]["ratio"] == 1 and {row["kind"] for row in rows} == {"ours", "peer"}
        assert all(row["seconds"] > 0 and row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] for row in rows)
    named = {row["name"] for rows in tables.values() for row in rows if row["kind"] == "ours"}
    for option in ("max_grad_norm", "norm_after_mask", "master_weights", "stochastic_rounding", "moment_dtype"):
        assert any(option in name for name in named), option


def test_the_fine_tune_is_run_with_every_kind_of_weights(folder):
    rows = read(folder, "precision")["rows"]
    assert [row["weights"] for row in rows] == [*WEIGHTS]
    assert all(len(row["losses"]) == row["steps"] == 2 and 0 <= row["accuracy"]["en"] <= 100 for row in rows)
    losses = {row["weights"]: row["losses"] for row in rows}
    assert losses["float32"] != losses["bf16"], "weights were not converted"
    assert losses["bf16"][0] == losses["bf16-master"][0] == losses["bf16-stochastic"][0], "the first is before any step"


def test_tables_and_figures(folder, tmp_path):
    found = load(folder)
    for name, words in (("modes", ["clipping", "masters", "stochastic rounding", "1 thread"]), ("precision", WEIGHTS)):
        text = render.section(name, "some-machine", found)
        assert all(word in text for word in words) and "a quick run, no measurement" in text
    assert cpu_figures.precision(found["some-machine"]["precision"], tmp_path).stat().st_size > 10_000


def test_a_precision_run_goes_on_where_it_ended(folder):
    """Nothing is left to do, so nothing is trained, and the file stays."""
    before = read(folder, "precision")
    run_well("cpu.precision", "--quick", "--resume", "--out", folder / "some-machine")
    assert read(folder, "precision") == before
