"""The benchmarks of trained rows and of attached masks run end to end, and have a table."""

import json
import sys
from pathlib import Path

from test_benchmarks import run_well

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common.results import load  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402


def test_every_variant_is_measured_and_shown(tmp_path):
    run_well("cpu.trained_rows", "--quick", "--out", tmp_path / "some-machine")
    result = json.loads((tmp_path / "some-machine" / "trained_rows.json").read_text())
    moments = [row["moment_bytes"] for row in result["rows"]]
    assert moments == [*3 * [2 * 4 * 500 * 8], *2 * [2 * 4 * 10 * 8], 2 * 4 * 8]
    text = render.section("trained-rows", "some-machine", load(tmp_path))
    for row in result["rows"]:
        assert f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {100 * row['ratio']:.2f} |" in text
    assert "a quick run, no measurement" in text and "| 640 | 2.00 |" in text


def test_every_attached_mask_is_measured_and_shown(tmp_path):
    run_well("cpu.attached_mask", "--quick", "--out", tmp_path / "some-machine")
    result = json.loads((tmp_path / "some-machine" / "attached_mask.json").read_text())
    assert len(result["rows"]) == 9 and not any("error" in row for row in result["rows"])
    text = render.section("attached-mask", "some-machine", load(tmp_path))
    for row in result["rows"]:
        assert f"| {row['name']} | {row['seconds'] * 1e3:.2f} | {row['ratio']:.2f} |" in text
