"""The one script for a GPU machine, as far as it can be held to account without one: the rehearsal of everything, parts
that fail or take too long, goals, files. No figure is judged. (The timer: test_benchmarks_timer.py.)
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from cases import require

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.common import cases, gpu_facts, machine, modes, peers, shapes  # noqa: E402
from benchmarks.common import results as files  # noqa: E402
from benchmarks.common import timers as gpu_timer  # noqa: E402
from benchmarks.common.tensors import MODES, Tensors, make_tensors  # noqa: E402
from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import host as host_gpu  # noqa: E402
from benchmarks.gpu import modes as modes_gpu  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402
from benchmarks.render import goals  # noqa: E402
from benchmarks.render import gpu_tables as render_gpu  # noqa: E402

NOT_REHEARSED = ("info", "bench, quick")

# --- the rehearsal ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[Path, str]:
    """(folder, what was printed) of a rehearsal: every benchmark, figure and table; info and bench have own tests."""
    require("cpu")
    folder = tmp_path_factory.mktemp("gpu") / "some-gpu"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(folder), "--budget", "300"]
    command += ["--archive", str(folder.with_suffix(".tar.gz")), "--skip", *NOT_REHEARSED]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def results(rehearsal) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in rehearsal[0].glob("*.json")}


@pytest.mark.slow
def test_rehearsal_runs_every_part(rehearsal, results):
    folder, printed = rehearsal
    run = results["gpu_run"]
    planned = [part.name for part in gpu.parts(True, folder) + gpu.end_parts(True, folder)]
    wanted = [name for name in planned if name not in NOT_REHEARSED]
    assert len(wanted) == len(planned) - len(NOT_REHEARSED)
    assert [(part["part"], part["status"]) for part in run["parts"]] == [(name, "ok") for name in wanted]
    assert re.search(r"^\[ +\d+ s\] done, everything ok$", printed, re.MULTILINE)
    assert re.search(r"[1-9]\d* passed", printed)  # the micro-suite, on CPU tensors
    assert not list(folder.glob("*.unfinished"))
    with tarfile.open(folder.with_suffix(".tar.gz")) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names == {folder.name, *(path.name for path in folder.iterdir())}


@pytest.mark.slow
def test_a_rehearsal_cannot_pass_for_a_result(rehearsal, results):
    folder, _ = rehearsal
    others = {"sweeps_gpu", "host_gpu", "modes_gpu", "gpu_run"}
    assert results.keys() == {*render_gpu.STEPS.values(), render_gpu.SLOW_PEERS, *others}
    assert all(result["rehearsal"] is result["quick"] is True for result in results.values())
    with pytest.raises(SystemExit, match="is a rehearsal on CPU tensors, not a result"):
        files.load(folder.parent)
    with pytest.raises(SystemExit, match="is a rehearsal"):
        render.main(["--results", str(folder.parent), "--machine", folder.name])
    page = (folder / "tables.md").read_text()
    _, *sections = page.split("\n## ")
    assert [section.split("\n")[0] for section in sections] == list(render_gpu.TABLES)
    for section in sections:
        assert "**a rehearsal on CPU tensors, no measurement" in section and "No results yet" not in section, section


@pytest.mark.slow
def test_tables_show_the_figures_of_the_results(rehearsal, results):
    page = (rehearsal[0] / "tables.md").read_text()
    for work, benchmark in render_gpu.STEPS.items():
        for config in results[benchmark]["configs"]:
            assert config["work"] == work
            for row in goals.measured(config["rows"]):
                shown = f"{row['ratio']:.3f} ({row['of_copy']:.0%})"
                assert re.search(rf"^\| {re.escape(goals.label(row))} \|.*{re.escape(shown)}", page, re.MULTILINE), row
    for row in goals.measured(results["host_gpu"]["host"]):
        shown = rf"^\| {re.escape(goals.label(row))} \|.* {row['seconds'] * 1e6:.0f} \("
        assert re.search(shown, page, re.MULTILINE), row
    for config in results["modes_gpu"]["configs"]:
        for row in config["rows"]:
            cells = row.get("error") or (
                f"{row['seconds'] * 1e3:.3f} | {row['ratio']:.3f} | {row['ratio_q1']:.3f}–{row['ratio_q3']:.3f} | "
                f"{row['bytes_per_param']:.0f} | {row['gb_per_s']:.0f} | {row['of_copy']:.0%}"
            )
            start = f"{goals.label(row)} ({cells})" if "error" in row else f"| {goals.label(row)} | {cells} |"
            assert start in page, row


@pytest.mark.slow
def test_rehearsal_measures_every_policy_peer_mode_and_work(results):
    policies = {case.name for case in cases.CASES}
    blocks = {case.name for case in cases.CASES if case.needs_blocks}
    for work, benchmark in render_gpu.STEPS.items():
        result = results[benchmark]
        assert [config["mode"] for config in result["configs"]] == list(MODES) and result["errors"] == []
        for config, width in zip(result["configs"], (28, 22, 14)):
            own, others = (
                {row["name"]: row for row in config["rows"] if row["kind"] == kind} for kind in ("ours", "peer")
            )
            expected = policies if work == "XLM-R-large" else policies - {cases.FIXED}
            assert own.keys() == (expected - blocks if work == "one tensor" else expected)
            mixed = config["mode"] == "bfloat16, float32 moments"
            quick_peers = {peer.name for peer in peers.PEERS if not peer.slow_start}
            assert others.keys() == quick_peers | ({"torch fused, all float32"} if mixed else set())
            assert own["GradDrop"]["bytes_per_param"] == config["bytes_per_param"] == width
            assert others["torch fused"]["bytes_per_param"] == (14 if mixed else width)
            assert own["GradDropEpoch, bit-packed"]["bytes_per_param"] == width + 3 / 8
            assert {row["name"] for row in config["first_steps"]} == {"torch fused", "mask=None", "GradDrop"}
            if work != "one tensor":
                freeze = own["GradFreeze, half frozen"]
                assert math.isclose(freeze["bytes_per_param"], width * freeze["active"])
                assert 0.4 < freeze["active"] < 0.9
    slow = results[render_gpu.SLOW_PEERS]["configs"]
    names = {row["name"] for row in slow[0]["rows"] if row["kind"] == "peer"}
    assert names == {"torch fused"} | {peer.name for peer in peers.PEERS if peer.slow_start}
    assert goals.measured(slow[0]["rows"], name="torch compiled")


@pytest.mark.slow
def test_figures_of_a_row_belong_together(results):
    for benchmark in render_gpu.STEPS.values():
        for config in results[benchmark]["configs"]:
            first, *_ = config["rows"]
            assert first["name"] == "torch fused" and first["ratio"] == 1
            for row in goals.measured(config["rows"]):
                assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
                assert 0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
                speed = row["bytes_per_param"] * config["numel"] / row["seconds"] / 1e9
                assert math.isclose(row["gb_per_s"], speed)
                assert math.isclose(row["of_copy"], speed / config["copy"]["gb_per_s"])
                assert (row["over_unmasked"] is None) == (row["kind"] != "ours")


@pytest.mark.slow
def test_rehearsal_measures_every_mode_beside_its_peers(results):
    result = results["modes_gpu"]
    configs = {(config["work"], config["table"]): config for config in result["configs"]}
    assert result["errors"] == [] and len(configs) == len(result["configs"])
    assert list(configs) == [(work.label, name) for work in modes_gpu.WORKS for name in modes.TABLES]
    bytes_of = {}
    for (work, name), config in configs.items():
        table, first = modes.TABLES[name], config["rows"][0]
        assert (config["mode"], first["kind"], first["ratio"]) == (table.mode, "peer", 1)
        own = {row["name"] for row in config["rows"] if row["kind"] == "ours"}
        assert own == {row.name for row in table.rows if isinstance(row, modes.Ours)}
        peers_of = {row.peer.name: row.peer for row in table.rows if isinstance(row, modes.Theirs)}
        assert {row["name"] for row in config["rows"]} - own == peers_of.keys()
        for row in config["rows"]:
            if "error" in row:  # and no other error than its package's
                peer = peers_of[row["name"]]
                later = peer.slow_start and work != modes_gpu.WORKS[0].label
                assert row["error"] == (modes_gpu.LATER if later else peers.unavailable(peer)), row
                continue
            bytes_of[row["name"]] = row["bytes_per_param"]
            assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
            speed = row["bytes_per_param"] * config["numel"] / row["seconds"] / 1e9
            assert math.isclose(row["gb_per_s"], speed)
            assert math.isclose(row["of_copy"], speed / config["copy"]["gb_per_s"])
    expected = {
        "torch fused": 28, "GradDrop": 28, "clip_grad_norm_, torch fused": 32, "GradDrop, max_grad_norm": 32,
        "float32 masters by hand, torch fused": 28, "GradDrop, master_weights": 28,
        "GradDrop, moment_dtype=float32": 22,
        "torch fused, rounded to nearest": 14, "GradDrop, stochastic_rounding": 14,
    }  # fmt: skip
    assert {name: bytes_of[name] for name in expected} == expected


def tiny(mode: str) -> Tensors:
    shapes_of = [("block.weight", "block", (7, 5)), ("block.bias", "block", (3,))]
    return make_tensors(shapes_of, mode, torch.device("cpu"))


def test_rows_of_the_modes_do_what_they_are_called(seed):
    torch.manual_seed(seed)
    for table in modes.TABLES.values():
        for row in table.rows:
            if isinstance(row, modes.Ours):
                optimizer = row.optimizer(tiny(table.mode), "reference")
                optimizer.step()
                (group,), state = optimizer.param_groups, next(iter(optimizer.state.values()))
                assert ("max_grad_norm" in row.name) == (optimizer.max_grad_norm is not None)
                assert ("norm_after_mask" in row.name) == optimizer.norm_after_mask
                assert ("stochastic_rounding" in row.name) == group["stochastic_rounding"]
                assert ("master_weights" in row.name) == ("master_param" in state)
                wide = table.mode != "bfloat16"
                assert state["exp_avg"].dtype == (torch.float32 if wide else torch.bfloat16)
                assert ("mask=None" in row.name) == (optimizer.active_fraction() == [1])


def test_masters_by_hand_are_the_step_of_float32_parameters(seed):
    """What torch's step makes of the wide parameters, rounded; and the gradients of now, not those of before."""
    torch.manual_seed(seed)
    hypers = {"lr": 3e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    tensors = tiny("bfloat16, float32 moments")
    wide = tensors.twin()
    wide.named = [(name, torch.nn.Parameter(param.detach().float())) for name, param in wide.named]
    step, _ = modes.masters_by_hand(tensors, hypers)
    expected = peers.torch_adamw(wide, hypers, fused=True)
    for _ in range(3):
        for param, master in zip(tensors.params, wide.params):
            param.grad = param.grad.normal_()
            master.grad = param.grad.float()
        step()
        expected.step()
        for param, master in zip(tensors.params, wide.params):
            assert torch.equal(param, master.bfloat16())


@pytest.mark.slow
def test_rehearsal_sweeps_and_checks(results):
    swept, host = results["sweeps_gpu"], results["host_gpu"]
    assert {row["numel"] for row in swept["sizes"]} == {size // 10_000 for size in shapes.SIZES}
    assert {row["copies"] for row in swept["sizes"]} > {1}  # small ones rotate
    assert {(row["total"], row["tensors"]) for row in swept["counts"]} == {
        (total, count) for total in shapes.COUNT_TOTALS for count in shapes.COUNTS[:3]
    }
    shares = [row["active"] for row in swept["frozen"] if row["mode"] == "float32"]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and 0 < shares[-1] < 0.5
    assert {row["moving"] for row in host["host"]} == {False, True}
    assert all(row["identical"] is True for row in host["graphs"]) and len(host["graphs"]) == len(host_gpu.GRAPH_CASES)
    assert all(row["synchronizations"] == 0 and row["refused"] is None for row in host["launches"])


# --- the run: parts fail, take too long, are left out -----------------------------------------------------------------


def make_run(tmp_path, budget: float = 60.0, archive: Path | None = None) -> gpu.Run:
    options = argparse.Namespace(budget=budget, out=tmp_path / "gpu", rehearse=True, archive=archive)
    return gpu.Run(options, options.out)


def python(code: str, seconds: float = 20.0, **options) -> gpu.Part:
    return gpu.Part("part", seconds, [sys.executable, "-c", code], **options)


def written(run: gpu.Run) -> list[dict]:
    return json.loads((run.folder / "gpu_run.json").read_text())["parts"]


def test_a_failing_part_is_recorded_with_what_it_said(tmp_path):
    run = make_run(tmp_path)
    run.carry_out(python(f"print('about to'); raise ValueError('of no use in {ROOT}/tests and {tmp_path}/gpu')"), 0)
    run.carry_out(python("print('fine')"), 0)
    failed, fine = written(run)
    assert failed["status"] == "failed" and failed["exit_code"] == 1
    assert failed["output"][0] == "about to" and failed["output"][-1] == "ValueError: of no use in tests and gpu"
    assert fine["status"] == "ok" and "output" not in fine
    assert not any(str(path) in json.dumps(written(run)) for path in (ROOT, tmp_path, sys.prefix))


def test_a_part_over_its_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    run, mark = make_run(tmp_path, budget=1.5), tmp_path / "child survived"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    start = time.monotonic()
    run.carry_out(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 1.0)
    assert time.monotonic() - start < 4
    (part,) = written(run)
    assert part["status"] == "over its time" and re.match(r"killed after \d s", part["why"])
    time.sleep(max(0.0, 5 - (time.monotonic() - start)))
    assert not mark.exists()


def test_what_does_not_fit_the_budget_is_left_out(tmp_path):
    run = make_run(tmp_path, budget=10.0, archive=tmp_path / "all.tar.gz")
    run.carry_out(python("raise SystemExit('never to run')"), reserve=6.0)
    (part,) = written(run)
    assert part["status"] == "left out" and part["why"] == "4 s left of the budget"
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert archive.getnames() == ["gpu", "gpu/gpu_run.json"]


def test_parts_take_budgets_and_environments(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run = make_run(tmp_path)
    code = "import os, sys; assert os.environ['A'] == 'b' and sys.argv[1:] == ['--budget', '8'], sys.argv; "
    code += f"assert os.environ['PYTHONPATH'].split(os.pathsep)[0] == {str(ROOT)!r}  # the package is not installed"
    run.carry_out(python(code, seconds=10.0, budgeted=True, environment=(("A", "b"),)), 0)
    assert written(run)[0]["status"] == "ok"


def test_a_full_run_fits_into_nine_minutes():
    real = gpu.parts(False, Path("results/some-gpu"))
    assert gpu.BUDGET < 9 * 60 and real[0].name == "build" and real[3].name == "step, XLM-R-large"
    assert not any("--rehearse" in part.command or "--collect-only" in part.command for part in real)
    assert dict(real[0].environment)["GRADDROP_FORCE_CUDA"] == "1"
    assert sum(part.seconds for part in real) <= gpu.BUDGET
    tests = next(part for part in real if part.name == "tests")
    assert "tests/backends/test_backends_agree.py" in tests.command
    assert "tests/backends/test_triton_interpreter.py" not in tests.command
    assert all((ROOT / word).exists() for word in tests.command if word.startswith("tests/"))
    end = gpu.end_parts(False, Path("results/some-gpu"))
    assert not any("rehears" in word for part in end for word in part.command)


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        gpu.main()
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        gpu_timer.make_timer(False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--rehearse", "--only", "lunch"])
    with pytest.raises(SystemExit, match="no part is called 'lunch'"):
        gpu.main()


# --- goals, facts, files ----------------------------------------------------------------------------------------------


def crafted(ratio: float, of_copy: float, us: float, identical: bool) -> dict:
    """Results of one machine: two backends, of which the second is the better."""
    good = {"name": "GradDrop", "kind": "ours", "backend": "triton", "over_unmasked": 1.02}
    good |= {"ratio": ratio, "of_copy": of_copy}
    bad = good | {"backend": "cuda", "ratio": 2 * ratio, "of_copy": of_copy / 2, "over_unmasked": 1.5}
    eager = {"name": "eager mask + torch fused", "kind": "peer", "backend": None, "ratio": 3.0}
    wide = {"name": "torch fused, all float32", "kind": "peer", "backend": None, "ratio": 1.25}
    configs = [{"mode": mode, "rows": [bad, good, eager, wide, {"name": "x", "error": "?"}]} for mode in goals.MODES]
    host = [
        {"name": "GradDrop", "backend": backend, "moving": moving, "seconds": us * 1e-6 * (1 + moving) * slower}
        for backend, slower in (("cuda", 9), ("triton", 1))
        for moving in (False, True)
    ]
    launches = [{"name": "GradDrop", "backend": "triton", "synchronizations": 0, "refused": None}]
    graphs = [{"identical": True}, {"identical": identical}]
    return {goals.LARGE: {"configs": configs}, "host_gpu": {"host": host, "launches": launches, "graphs": graphs}}


def test_goals_are_judged_by_the_best_backend():
    good = goals.judge(crafted(ratio=0.98, of_copy=0.94, us=55.0, identical=True))
    assert all(reached for *_, reached in good), [goal.text for goal, _, reached in good if not reached]
    values = {goal.text: value for goal, value, _ in good}
    assert values["GradDrop, float32: time / torch fused"] == 0.98
    assert values["eager mask + torch fused / GradDrop, float32"] == pytest.approx(3 / 0.98)
    assert values["GradDrop, bfloat16, float32 moments: time / torch fused, all float32"] == pytest.approx(0.98 / 1.25)
    bad = {goal.text: reached for goal, _, reached in goals.judge(crafted(1.3, 0.8, 160.0, False))}
    met = {"GradDrop, float32: mask on / mask off", "synchronisations of a step"}
    assert {text for text, reached in bad.items() if reached} >= met
    assert not bad["GradDrop, float32: time / torch fused"] and not bad["eager mask + torch fused / GradDrop, float32"]
    assert not bad["share of captured steps that replay bit for bit"]
    assert not bad["host time of 400 tensors, addresses moving, us"]
    assert all(value is reached is None for _, value, reached in goals.judge({}))


def test_what_the_driver_tells_is_parsed():
    told = gpu_facts.parse_nvidia_smi("580.159.04, 1980, 3201, 345, 3201, 700.00, 31")
    assert told == {"driver": "580.159.04", "sm_mhz_max": 1980, "memory_mhz_max": 3201, "sm_mhz_now": 345,
                    "memory_mhz_now": 3201, "power_limit_w": 700, "temperature_c": 31}  # fmt: skip
    assert gpu_facts.parse_nvidia_smi("580, [N/A], 1, 2, 3, [Not Supported], 4")["power_limit_w"] is None
    for nothing in (None, "garbage"):
        assert set(gpu_facts.parse_nvidia_smi(nothing).values()) == {None}
    assert machine.gpu_slug({"gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"
    assert machine.gpu_slug({"gpu": None}) == "no-gpu"


def test_results_are_replaced_as_a_whole(tmp_path, monkeypatch):
    options = argparse.Namespace(out=tmp_path, rehearse=True)
    path = files.write_gpu("host_gpu", options, {"rows": [1]})

    def interrupted(self, text):
        with open(self, "w") as file:
            file.write(text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_gpu("host_gpu", options, {"rows": [1, 2]})
    assert json.loads(path.read_text())["rows"] == [1]


def test_a_rehearsal_without_out_stays_away_from_the_results():
    options = argparse.Namespace(out=None, rehearse=True)
    assert files.RESULTS not in files.gpu_folder(options).parents
    assert files.gpu_folder(options) == options.out  # the same for every part
