"""The benchmarks: every script runs end to end, tables cannot go stale unseen. No figure is judged."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from cases import require

from graddrop_kernels import FusedGradDropAdamW, GradDrop
from graddrop_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.common import cases, machine, peers, rounds  # noqa: E402
from benchmarks.common import results as files  # noqa: E402
from benchmarks.common.shapes import encoder, flat  # noqa: E402
from benchmarks.common.tensors import Tensors, make_tensors  # noqa: E402
from benchmarks.common.timers import HostTimer  # noqa: E402
from benchmarks.common.variants import peer_variant  # noqa: E402
from benchmarks.cpu import memory  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402
from benchmarks.render import cpu_tables  # noqa: E402

NUMEL = 40_000
COUNT = 400  # tensors
IN_TESTS_OF_THEIR_OWN = (
    "modes", "precision", "skip-backward", "sampled-blocks", "growing-costs", "trained-rows", "attached-mask",
)  # fmt: skip


def run(module: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def run_well(module: str, *arguments) -> str:
    process = run(module, *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def render_well(*arguments) -> None:
    assert render.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of every script, of one made-up machine."""
    require("cpu")
    results = tmp_path_factory.mktemp("results")
    out = ("--quick", "--out", results / "some-machine")
    run_well(
        "cpu.step", *out, "--numel", NUMEL, "--threads", 1, "--isas", cpu.isa(), "portable", "--dtypes", "bfloat16"
    )
    run_well("cpu.host_overhead", *out, "--tensors", 3, 20)
    run_well("cpu.memory", *out, "--numel", NUMEL)
    run_well("cpu.bandwidth", *out, "--threads", 1, 2)
    return results


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "some-machine").glob("*.json")}


def test_every_result_says_where_it_comes_from(results):
    assert results.keys() == {"step_cpu_bfloat16", "host_overhead", "memory", "bandwidth"}
    for name, result in results.items():
        assert result["benchmark"] == name and result["quick"] is True
        assert result["machine"]["torch"] == torch.__version__ and result["machine"]["cores"] == os.cpu_count()
        assert cpu.isa() in result["machine"]["isas"] and isinstance(result["machine"]["dirty"], bool)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", result["when"])
        assert result["load"].keys() == {"before", "after", "elsewhere"}


def test_a_step_is_measured_for_every_policy_and_peer(results):
    (run,) = results["step_cpu_bfloat16"]["runs"]
    layers, one, *portable = run["configs"]
    assert (layers["layout"], layers["tensors"], one["layout"], one["tensors"], one["numel"]) == (
        "layers",
        COUNT,
        "one tensor",
        1,
        NUMEL,
    )
    expected = {(case.name, cpu.isa()) for case in (*cases.CASES, *cases.SWEEP)}
    expected |= {(name, None) for name in (*(peer.name for peer in peers.TORCHS), "torch fused, own tensors")} | {
        ("GradDrop, own tensors", cpu.isa())
    }
    expected |= {(f"{draw} mask, multiply, torch fused", None) for draw in ("bernoulli_", "torch.rand")}
    assert {(row["name"], row["isa"]) for row in layers["rows"]} == expected
    without_blocks = {case.name for case in cases.CASES if not case.needs_blocks}
    assert {row["name"] for row in one["rows"] if row["kind"] == "ours"} == without_blocks
    assert cpu.isa() == "portable" or [config["isas"] for config in portable] == [["portable"]]


def test_the_figures_of_a_row_belong_together(results):
    (run,) = results["step_cpu_bfloat16"]["runs"]
    for config in run["configs"]:
        for row in config["rows"]:
            assert (
                0 < row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
                and 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
            )
            assert math.isclose(row["ns_per_param"], row["seconds"] * 1e9 / config["numel"])
            assert math.isclose(row["gb_per_s"], row["bytes_per_param"] / row["ns_per_param"])
        assert config["rows"][0]["name"] == "torch fused" and config["rows"][0]["ratio"] == 1


def test_bytes_count_what_a_policy_leaves_out(results):
    """7 streams of 2 bytes, more for stored bits, fewer for dropped blocks."""
    (run,) = results["step_cpu_bfloat16"]["runs"]
    moved = {row["name"]: row["bytes_per_param"] for row in run["configs"][0]["rows"]}
    assert moved["torch fused"] == moved["GradDrop"] == moved["GradDropEpoch, recomputed"] == 14
    assert moved["GradDropEpoch, bit-packed"] == 14 + 3 / 8 and moved["FixedMask, 50 %"] == 14 + 1 / 8
    assert math.isclose(moved["GradFreeze, half frozen"], 14 * 13 / 25)  # ceil(25 / 2) trained
    for frozen in (0, 5, 10, 15, 20, 24):
        assert math.isclose(moved[f"{frozen} of 25 layers frozen"], 14 * (25 - frozen) / 25)
    assert 12 <= moved["LayerGradDrop"] <= 14


def test_host_overhead_and_bandwidth(results):
    rows = results["host_overhead"]["rows"]
    assert {row["tensors"] for row in rows} == {3, 20}
    assert {"torch fused", "GradDrop", "GradDrop, DTensors"} <= {row["name"] for row in rows}
    for row in results["bandwidth"]["rows"]:
        assert row["copy"]["traffic_gb_per_s"] == pytest.approx(1.5 * row["copy"]["gb_per_s"], rel=1e-2)
    assert [row["threads"] for row in results["bandwidth"]["rows"]] == [1, 2]


def test_memory_is_counted_to_the_byte(results):
    numel = results["memory"]["numel"]
    kept = {(row["name"], row["dtype"], row["moment_dtype"]): row["kept_bytes"] for row in results["memory"]["rows"]}
    dtypes = (
        ("float32", "float32", 8), ("bfloat16", "bfloat16", 4), ("bfloat16", "bfloat16, rounded stochastically", 4),
        ("bfloat16", "float32", 8), ("bfloat16", "float32 and masters", 12),
    )  # fmt: skip
    for param, moments, size in dtypes:
        for case in cases.CASES:
            own = kept[case.name, param, moments] - size * numel - 4 * COUNT
            # bits in words of 32 for each tensor
            assert (
                own == 0 if not case.mask_bits else 0 <= own - case.mask_bits * numel / 8 <= 4 * case.mask_bits * COUNT
            )


def test_memory_finds_a_tensor_that_an_optimizer_hides():
    param = torch.nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    tensors = Tensors([("weight", param)], ["weight"], [])
    optimizer = FusedGradDropAdamW(tensors.named, mask=GradDrop(0.4))
    optimizer.step()
    kept, tables = memory.kept_bytes(optimizer, tensors.params)
    assert kept == memory.computed_bytes(tensors, torch.float32, 0) == 2 * 8 * 4 + 4
    optimizer.masking._words[0, "weight"] = ((), torch.zeros(3, dtype=torch.int32))
    optimizer.extra = {"hidden": [numpy.zeros(5, numpy.int16)]}
    assert memory.kept_bytes(optimizer, tensors.params) == (kept + 12, tables + 10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of the resident memory")
def test_memory_sees_what_a_step_takes_for_itself():
    def step():
        return [torch.ones(1 << 14) for _ in range(200)] and None  # small enough for the allocator to keep

    growth = [memory.peak_growth(step) for _ in range(3)]  # what it kept is seen again
    expected = 200 * 4 * 2**14
    assert all(0.9 * expected < grown < 1.5 * expected for grown in growth), growth


def test_optimizers_that_share_tensors_do_not_meet(seed):
    """A step on shared tensors, among other optimizers' steps, is bit for bit the step of an optimizer alone."""
    require("cpu")
    torch.manual_seed(seed)
    shared, timer = make_tensors(encoder(1), "float32"), HostTimer()
    tested = [cases.CASE["GradDrop"], cases.CASE["GradDropEpoch, bit-packed"]]
    optimizers = [cases.make_optimizer(case, shared, "cpu") for case in tested]
    others = [peer_variant(peer, shared, "float32", timer) for peer in peers.ON_CPU]
    for case, optimizer in zip(tested, optimizers):
        case.enter_last_epoch(optimizer)
        for number, other in enumerate(others):
            other.run(timer, number)
        own_step = 1000 + len(case.epochs)
        assert all(optimizer.state[param]["step"] == own_step for _, param in shared.named)
        alone = shared.twin()
        lonely = case.optimizer(alone, backend="cpu")
        lonely.load_state_dict(optimizer.state_dict())
        for (_, param), moments in zip(alone.named, alone.moments):
            lonely.state[param] |= {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
        optimizer.step(), lonely.step()
        for (name, param), (_, other) in zip(shared.named, alone.named):
            assert torch.equal(param, other), name
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[param][key], lonely.state[other][key]), (
                    f"{case.name}: {key} of {name}"
                )


def test_eager_peers_mask_and_restore(seed):
    torch.manual_seed(seed)
    tensors = make_tensors(flat(100_000), "float32")
    (param,) = tensors.params
    grad = param.grad.clone()
    eager = [peer_variant(peer, tensors, "float32", HostTimer()) for peer in peers.ON_CPU if peer.masks]
    assert len(eager) == 2
    for peer in eager:
        peer.step()
        dropped = (param.grad == 0).double().mean().item()
        assert abs(dropped - 0.2) < 6 * (0.2 * 0.8 / 1e5) ** 0.5, peer.name
        kept = param.grad != 0
        torch.testing.assert_close(param.grad[kept], grad[kept] / 0.8)
        peer.after()
        assert torch.equal(param.grad, grad), peer.name


def test_rounds_have_the_baseline_and_no_warm_up():
    calls = {"base": 0, "slow": 0}

    def counted(name: str, seconds: float):
        def step():
            calls[name] += 1
            time.sleep(seconds)

        return rounds.Variant(name, "peer", step)

    variants = [counted("base", 0), counted("slow", 0.01)]
    rounds.interleave(variants, HostTimer(), time.monotonic() - 1, 10, 1000, 5)
    base, slow = variants
    assert list(base.samples) == list(range(10)) and calls["base"] == 12
    assert slow.samples.keys() <= base.samples.keys() and len(slow.samples) == calls["slow"] - 2 >= 2
    assert all(len(variant.shares) == len(variant.bytes_of) == len(variant.samples) for variant in variants)


def test_what_a_variant_raises_ends_a_measurement_on_the_cpu():
    with pytest.raises(ZeroDivisionError):
        rounds.interleave([rounds.Variant("bad", "ours", lambda: 1 / 0)], HostTimer(), 0, 1, 1)


def test_plots(folder):
    drawn = {Path(line) for line in run_well("render.figures", "--results", folder).splitlines()}
    expected = ("step_cpu_bfloat16", "frozen_blocks", "bandwidth", "host_overhead", "memory")
    assert drawn == {folder / "some-machine" / f"{name}.png" for name in expected}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.fixture
def readme(tmp_path) -> Path:
    """Every table twice: of all machines and of one."""
    path = tmp_path / "README.md"
    markers = [
        f"<!-- benchmark: {name}{one} -->\nold\n<!-- /benchmark -->"
        for name in cpu_tables.TABLES
        for one in ("", " some-machine")
    ]
    path.write_text("before – \n\n" + "\n\nbetween\n\n".join(markers) + "\n\nafter\n")
    return path


def test_tables_are_rendered_once_and_checked(folder, readme, capsys):
    arguments = ("--results", str(folder), str(readme))
    assert render.main(["--check", *arguments]) == 1 and "\nold\n" in readme.read_text()
    render_well(*arguments)
    text = readme.read_text()
    tables = 2 * len(cpu_tables.TABLES)
    assert (
        "\nold\n" not in text
        and text.startswith("before – \n\n<!-- benchmark: machine -->\n")
        and text.endswith("-->\n\nafter\n")
    )
    elsewhere = 2 * len(IN_TESTS_OF_THEIR_OWN)
    assert text.count("\nbetween\n") == tables - 1 and text.count("No results yet") == elsewhere
    assert sum("a quick run, no measurement" in line for line in text.splitlines()) == tables - elsewhere
    render_well("--check", *arguments)
    render_well(*arguments)
    assert readme.read_text() == text

    figure = re.search(r"\| GradDrop \| (\d+\.\d\d) \|", text)
    readme.write_text(text[: figure.start(1)] + "0.01" + text[figure.end(1) :])  # typed by hand
    capsys.readouterr()
    assert render.main(["--check", *arguments]) == 1
    assert f"{readme}: not up to date" in capsys.readouterr().out
    render_well(*arguments)
    assert readme.read_text() == text


def test_a_machine_has_a_page_of_every_table(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "results")
    arguments = ("--results", str(copy), "--machine", "some-machine")
    assert render.main(["--check", *arguments]) == 1 and not list(copy.rglob("*.md"))
    render_well(*arguments)
    path = copy / "some-machine" / "tables.md"
    text = path.read_text()
    left_out = (*IN_TESTS_OF_THEIR_OWN, *cpu_tables.EXTRACTS)  # no results here; parts
    wanted = [name for name in cpu_tables.TABLES if name not in left_out]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == wanted and "No results yet" not in text
    render_well("--check", *arguments)
    path.write_text(text.replace("## memory", "## my memory"))
    assert render.main(["--check", *arguments]) == 1
    with pytest.raises(SystemExit, match="no results of machine 'another'"):
        render.main([*arguments[:-1], "another"])


def test_a_table_shows_the_figures_of_the_results(folder, results):
    text = render.section("step", None, files.load(folder))
    (run,) = results["step_cpu_bfloat16"]["runs"]
    for row in run["configs"][0]["rows"]:
        if row["kind"] != "sweep":
            assert f"| {row['name']} | {row['ratio']:.2f} |" in text
    text = render.section("memory", "some-machine", files.load(folder))
    (row,) = (
        row
        for row in results["memory"]["rows"]
        if row["name"] == "GradDropEpoch, bit-packed" and row["dtype"] == "float32"
    )
    assert f"| GradDropEpoch, bit-packed | 3 | {row['kept_per_param']:.3f} + " in text


def test_a_new_result_makes_tables_stale(folder, readme, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "results")
    arguments = ("--results", str(copy), str(readme))
    render_well(*arguments)
    path = copy / "some-machine" / "memory.json"
    result = json.loads(path.read_text())
    result["rows"][4]["kept_per_param"] += 0.125
    path.write_text(json.dumps(result))
    assert render.main(["--check", *arguments]) == 1


def test_what_speaks_against_a_figure_stands_above_it(results):
    clean = results["memory"]["machine"] | {
        "dirty": False,
        "kernels_older_than_csrc": False,
        "commit": "0123456789abcdef",
    }
    quiet = results["memory"] | {"quick": False, "machine": clean, "load": {"elsewhere": 0.02}}
    assert (
        "**" not in cpu_tables.caption(quiet)
        and "0123456789a" not in cpu_tables.caption(quiet)
        and "012345678" in cpu_tables.caption(quiet)
    )
    doubts = {
        "a quick run, no measurement": {"quick": True},
        "code changed since that commit": {"machine": clean | {"dirty": True}},
        "csrc edited after it was compiled": {"machine": clean | {"kernels_older_than_csrc": True}},
        "other programs used up to 0.4 cores": {"load": {"elsewhere": 0.4}},
    }
    for doubt, change in doubts.items():
        assert cpu_tables.caption(quiet | change).endswith(f"**{doubt}**")


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- benchmark: speed -->\n<!-- /benchmark -->", "unknown table 'speed'"),
        ("<!-- benchmark: step my-machine -->\n<!-- /benchmark -->", "no results of machine 'my-machine'"),
        ("<!-- benchmark: step -->\n", "needs its <!-- /benchmark -->"),
    ],
)
def test_a_wrong_marker_is_an_error(tmp_path, text, message):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        render.main(["--results", str(tmp_path), str(path)])
    assert path.read_text() == text


def test_no_results_are_said_to_be_missing(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- benchmark: step -->\n<!-- /benchmark -->")
    render_well("--results", tmp_path, path)
    assert "No results yet" in path.read_text()


def test_the_tables_of_the_project_are_up_to_date():
    process = run("render", "--check")
    assert process.returncode == 0, process.stdout


def test_machines_of_one_name_have_folders_of_their_own():
    facts = {"cpu": "Intel(R) Xeon(R) CPU @ 2.80GHz", "family": 6, "model": 85, "cores": 8}
    assert machine.slug(facts) == "intel-xeon-cpu-2-80ghz-f6-m85-8-cores"
    assert machine.slug(facts | {"model": 106}) != machine.slug(facts)
    assert machine.slug({"cpu": "arm64", "family": None, "model": None, "cores": 10}) == "arm64-10-cores"


def test_a_file_of_results_has_a_line_for_each_measurement_and_loses_nothing():
    rows = [{"name": "a", "seconds": 0.1 + 0.2, "losses": [1e-300, 2.5]}, {"name": "b\n", "seconds": None, "more": {}}]
    result = {"benchmark": "x", "machine": {"isas": ["avx2"]}, "none": [], "runs": [{"threads": 1, "rows": rows}]}
    text = files.text_of(result)
    assert json.loads(text) == result and text.endswith("}\n")
    assert [line.strip(" ,") for line in text.splitlines() if "seconds" in line] == list(map(json.dumps, rows))
    assert len(text.splitlines()) == 14
    assert files.text_of({"a": [1, 2], "b": {}}) == '{"a": [1, 2], "b": {}}\n'


def test_committed_results_are_written_so():
    for path in [*files.RESULTS.glob("*/*.json"), files.RESULTS / files.CONTRACT]:
        assert path.read_text() == files.text_of(json.loads(path.read_text())), path


def test_load_tells_others_from_the_benchmark():
    load = machine.Load()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    report = load.report()
    assert report["elsewhere"] is None or 0 <= report["elsewhere"] <= os.cpu_count()


def test_load_counts_helpers_as_ours(monkeypatch):
    """Of 10 s on all cores in 10 s, this process took 1 s, and helpers that are no children 7 s."""
    for name, seconds in (("_busy_seconds", [100.0, 110.0]), ("_own_seconds", [3.0, 4.0])):
        monkeypatch.setattr(machine, name, iter(seconds).__next__)
    load = machine.Load()
    load.started -= 10
    assert load.report(helpers=7.0)["elsewhere"] == pytest.approx(0.2, rel=0.05)
