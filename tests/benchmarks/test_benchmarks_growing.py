"""The benchmark of costs that could grow runs end to end, and has a table."""

import json
import sys
from pathlib import Path

import pytest
from test_benchmarks import run_well

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common.results import load  # noqa: E402
from benchmarks.cpu import growing_costs  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402


@pytest.mark.slow
def test_every_part_is_measured_and_shown(tmp_path):
    run_well("cpu.growing_costs", "--quick", "--out", tmp_path / "some-machine")
    result = json.loads((tmp_path / "some-machine" / "growing_costs.json").read_text())
    assert {row["work"] for row in result["experts"]} == {"100% of 40 tensors", "50% of 40 tensors", *(
        f"{share}% of 40 tensors" for share in (25, 5)
    )}  # fmt: skip
    assert result["channels_last"][0]["name"] == "torch fused" and len(result["channels_last"]) > 8
    assert [row["epochs"] for row in result["epochs"]] == [100, 100]
    assert len(result["groups"]) == 9 and all(row["seconds"] > 0 for row in result["groups"])
    text = render.section("growing-costs", "some-machine", load(tmp_path))
    for row in result["channels_last"]:
        assert f"| {row['name']} | {row['seconds'] * 1e3:.2f} | {row['over_contiguous']:.2f} |" in text
    assert "a quick run, no measurement" in text and "history at the end" in text


def test_the_strides_that_are_measured():
    own = growing_costs.strided(growing_costs.CASE["GradDrop"], (4, 3, 2, 2), growing_costs.torch.channels_last)
    own.step()
    (param,) = own.step.__self__.param_groups[0]["params"]
    state = own.step.__self__.state[param]
    assert param.stride() == param.grad.stride() == state["exp_avg"].stride() == (12, 1, 6, 3)
