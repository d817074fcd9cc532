"""What is measured on a GPU, rehearsed on CPU tensors; goals, facts. No figure is judged. (The run, its stages and what
becomes of those that fail: test_benchmarks_gpu_run.py. The timer: test_benchmarks_timer.py.)
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from cases import require

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.common import cases, gpu_facts, machine, modes, peers, shapes  # noqa: E402
from benchmarks.common import results as files  # noqa: E402
from benchmarks.common.rows import Recorder, assembled  # noqa: E402
from benchmarks.common.tensors import MODES, Tensors, make_tensors  # noqa: E402
from benchmarks.common.timers import RehearsalTimer  # noqa: E402
from benchmarks.gpu import host as host_gpu  # noqa: E402
from benchmarks.gpu import modes as modes_gpu  # noqa: E402
from benchmarks.gpu import stages, step  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402
from benchmarks.render import goals  # noqa: E402
from benchmarks.render import gpu_tables as render_gpu  # noqa: E402

BUDGET = 400.0  # the long plan; every stage of the rehearsal is far shorter than its share

# --- the rehearsal ----------------------------------------------------------------------------------------------------


def rehearse(folder: Path, budget: float) -> str:
    """Rehearses every stage of a plan. Returns what was printed."""
    require("cpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(folder), "--budget", f"{budget}"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[Path, str]:
    """(folder with run.tar.gz, what was printed) of a rehearsal of the long plan."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, rehearse(folder, BUDGET)


@pytest.fixture(scope="module")
def rendered(rehearsal, tmp_path_factory) -> Path:
    """The folder of files, figures and tables that are made of the archive afterwards."""
    results = tmp_path_factory.mktemp("results")
    render.main(["--archive", str(rehearsal[0] / "run.tar.gz"), "--rehearsal", "--results", str(results)])
    (folder,) = results.iterdir()
    return folder


@pytest.fixture(scope="module")
def results(rendered) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in rendered.glob("*.json")}


@pytest.mark.slow
def test_rehearsal_carries_out_every_stage_within_the_budget(rehearsal, results):
    folder, printed = rehearsal
    run = results["gpu_run"]
    planned = stages.plan(BUDGET, True, 0)
    programs = {one.name for stage in planned if isinstance(stage, stages.Programs) for one in stage.programs}
    measured = {stage.name for stage in planned if isinstance(stage, stages.Measurement)}
    assert {each["stage"] for each in run["stages"]} == programs | measured
    assert all(each["status"] == "ok" for each in run["stages"])
    seconds, last = re.findall(r"^\[ *([\d.]+) s\] (.*)$", printed, re.MULTILINE)[-1]
    assert last == "done, everything ok" and float(seconds) < BUDGET
    assert len(re.findall(r"verify \w+: PASS( so far)?: ", printed)) == 4
    assert [path.name for path in folder.iterdir()] == ["run.tar.gz"]
    with tarfile.open(folder / "run.tar.gz") as archive:
        assert archive.getnames() == ["log.txt", "rows.jsonl"]
        log = archive.extractfile("log.txt").read().decode()
    assert log.splitlines() == printed.splitlines()
    assert not any(str(path) in log for path in (ROOT, sys.prefix)) and str(ROOT) not in json.dumps(run)


@pytest.mark.slow
def test_the_short_plan_is_carried_out_within_its_budget(tmp_path):
    budget = 200.0
    seconds, last = re.findall(r"^\[ *([\d.]+) s\] (.*)$", rehearse(tmp_path, budget), re.MULTILINE)[-1]
    assert last == "done, everything ok" and float(seconds) < budget
    with tarfile.open(tmp_path / "run.tar.gz") as archive:
        found = assembled(archive.extractfile("rows.jsonl").read().decode().splitlines())
    assert found.keys() == {"gpu_run", "step_gpu_xlmr_large", "host_gpu", "modes_gpu", "sweeps_gpu"}
    assert {config["table"] for config in found["modes_gpu"]["configs"]} == {"clipping", "masters"}
    assert found["sweeps_gpu"]["frozen"] and not found["sweeps_gpu"]["sizes"]


@pytest.mark.slow
def test_a_rehearsal_cannot_pass_for_a_result(rehearsal, rendered, results):
    folder, archive = rendered, str(rehearsal[0] / "run.tar.gz")
    others = {"sweeps_gpu", "host_gpu", "modes_gpu", "gpu_run"}
    assert results.keys() == {*render_gpu.STEPS.values(), *others}
    assert all(result["rehearsal"] is result["quick"] is True for result in results.values())
    with pytest.raises(SystemExit, match="is a rehearsal on CPU tensors, not a result"):
        files.load(folder.parent)
    with pytest.raises(SystemExit, match="is a rehearsal"):
        render.main(["--results", str(folder.parent), "--machine", folder.name])
    for options in ([], ["--rehearsal"], ["--results", str(folder.parent)]):
        with pytest.raises(SystemExit, match="is of a rehearsal, not of a GPU"):
            render.main(["--archive", archive, *options])
    page = (folder / "tables.md").read_text()
    _, *sections = page.split("\n## ")
    names = [name for name in render_gpu.TABLES if name != "gpu-slow-peers"]
    assert [section.split("\n")[0] for section in sections] == names
    for section in sections:
        assert "**a rehearsal on CPU tensors, no measurement" in section and "No results yet" not in section, section


@pytest.mark.slow
def test_an_archive_of_a_run_that_was_killed_can_be_rendered(rehearsal, tmp_path, seed):
    """After any of its rows, in the middle of a line too: what is missing is left out."""
    with tarfile.open(rehearsal[0] / "run.tar.gz") as archive:
        rows = archive.extractfile("rows.jsonl").read()
    order, begin = random.Random(seed), rows.index(b'"when"') + 100  # the machine is known
    for number, size in enumerate([begin, *(order.randrange(begin, len(rows)) for _ in range(4))]):
        results, cut = tmp_path / f"{number}", tmp_path / f"{number}.tar.gz"
        (tmp_path / "rows.jsonl").write_bytes(rows[:size])
        with tarfile.open(cut, "w:gz") as archive:
            archive.add(tmp_path / "rows.jsonl", "rows.jsonl")
        print(f"the first {size} of {len(rows)} bytes")
        render.main(["--archive", str(cut), "--rehearsal", "--results", str(results)])
        assert (results / "no-gpu" / "tables.md").read_text().startswith("# Results on no-gpu")


@pytest.mark.slow
def test_tables_show_the_figures_of_the_results(rendered, results):
    page = (rendered / "tables.md").read_text()
    assert page.count(f"| time / torch fused (share of copy bandwidth) | {' | '.join(MODES)} |") == 4  # in this order
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
        configs = {config["mode"]: config for config in result["configs"]}
        assert configs.keys() == MODES.keys() and len(result["configs"]) == 3 and result["errors"] == []
        for config, width in zip((configs[mode] for mode in MODES), (28, 22, 14)):
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
    for (_, name), config in configs.items():
        table, first = modes.TABLES[name], config["rows"][0]
        assert (config["mode"], first["kind"], first["ratio"]) == (table.mode, "peer", 1)
        own = {row["name"] for row in config["rows"] if row["kind"] == "ours"}
        assert own == {row.name for row in table.rows if isinstance(row, modes.Ours)}
        peers_of = {row.peer.name: row.peer for row in table.rows if isinstance(row, modes.Theirs)}
        assert {row["name"] for row in config["rows"]} - own == peers_of.keys()
        for row in config["rows"]:
            if "error" in row:  # and no other error than its package's
                peer = peers_of[row["name"]]
                assert row["error"] == (modes_gpu.LATER if peer.slow_start else peers.unavailable(peer)), row
                continue
            bytes_of.setdefault(row["name"], row["bytes_per_param"])  # those of float32 come first
            assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
            speed = row["bytes_per_param"] * config["numel"] / row["seconds"] / 1e9
            assert math.isclose(row["gb_per_s"], speed)
            assert math.isclose(row["of_copy"], speed / config["copy"]["gb_per_s"])
    expected = {
        "torch fused": 28, "GradDrop": 28, "clip_grad_norm_, torch fused": 32, "GradDrop, max_grad_norm": 32,
        "float32 masters by hand, torch fused": 28, "GradDrop, master_weights": 28,
        "GradDrop, moment_dtype=float32": 22, 'GradDrop, masked="update"': 28,
        "GradDrop, cautious_weight_decay": 28, "GradDrop, stochastic_moments": 14,
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
                assert ("stochastic_moments" in row.name) == group["stochastic_moments"]
                assert ("cautious" in row.name) == group["cautious_weight_decay"]
                assert ("update" in row.name) == (group["masked"] == "update")
                assert ("SkipUpdate" in row.name) == ("SkipUpdate" in (group["mask"] or ""))
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


# --- what fails costs itself only -------------------------------------------------------------------------------------


def lines_of(recorder: Recorder) -> list[str]:
    return recorder.path.read_text().splitlines()


def test_a_first_step_that_fails_leaves_what_was_measured_before(monkeypatch, tmp_path):
    require("cpu")
    recorder = Recorder(tmp_path)

    def fail(*arguments):
        raise MemoryError("no room for zeros")

    monkeypatch.setattr(step, "first_steps", fail)
    failed = step.run(recorder, RehearsalTimer(), 1.0, ["one_tensor"], ["float32", "bfloat16"])
    found = assembled(lines_of(recorder))["step_gpu_one_tensor"]
    assert failed == len(found["errors"]) == 2 and found["errors"][0]["error"] == "MemoryError: no room for zeros"
    assert [config["mode"] for config in found["configs"]] == ["float32", "bfloat16"]
    assert all(goals.measured(config["rows"], name="GradDrop") for config in found["configs"])


def test_wide_tensors_without_room_cost_their_row_only(monkeypatch, tmp_path):
    require("cpu")
    made = step.make_tensors

    def make(shapes_of, mode, device):
        if mode == "float32":
            raise MemoryError("no room for wide ones")
        return made(shapes_of, mode, device)

    monkeypatch.setattr(step, "make_tensors", make)
    recorder = Recorder(tmp_path)
    assert step.run(recorder, RehearsalTimer(), 1.0, ["one_tensor"], ["bfloat16, float32 moments"]) == 0
    (config,) = assembled(lines_of(recorder))["step_gpu_one_tensor"]["configs"]
    rows = {row["name"]: row for row in config["rows"]}
    assert rows["torch fused, all float32"]["error"] == "MemoryError: no room for wide ones"
    assert rows["GradDrop"]["ratio"] > 0


def test_host_times_that_fail_cost_no_launches_and_no_graphs(monkeypatch, tmp_path):
    require("cpu")

    def fail(timer, seconds):
        yield {"name": "GradDrop", "backend": "cpu", "moving": False, "seconds": 1.0}
        raise ValueError("of no use")

    monkeypatch.setattr(host_gpu, "host_times", fail)
    monkeypatch.setattr(host_gpu, "GRAPH_CASES", ("GradDrop",))
    monkeypatch.setattr(host_gpu, "HOST_CASES", ("GradDrop",))
    recorder = Recorder(tmp_path)
    assert host_gpu.run(recorder, RehearsalTimer(), 1.0) == 1
    found = assembled(lines_of(recorder))["host_gpu"]
    assert found["errors"] == [{"part": "host", "error": "ValueError: of no use"}]
    assert len(found["host"]) == 1 and found["launches"] and found["graphs"]


def test_rows_are_written_while_the_rounds_go_on(monkeypatch, tmp_path):
    """A process that is killed in its last round leaves the rounds before."""
    require("cpu")
    monkeypatch.setattr(step, "SO_FAR", 0.0, raising=False)
    monkeypatch.setattr("benchmarks.common.rounds.SO_FAR", 0.0)
    recorder = Recorder(tmp_path)
    step.run(recorder, RehearsalTimer(), 1.0, ["one_tensor"], ["float32"])
    written = [json.loads(line) for line in lines_of(recorder) if '"configs"' in line and '"row"' in line]
    rounds = [[row["rounds"] for row in entry["row"]["rows"] if row["name"] == "torch fused"][0] for entry in written]
    assert rounds == [1, 2, 2, 2]  # of two rounds, at their end, and with the first steps
    (config,) = assembled(lines_of(recorder))["step_gpu_one_tensor"]["configs"]
    assert config["first_steps"]


def test_a_replay_is_prepared_as_an_eager_step_is(monkeypatch, seed):
    """Blocks and epochs are drawn by the host: without advance_captured_step() a replay repeats the captured ones."""
    require("cpu")

    class Captured:
        """A step with an effect of the host's own, as a graph has it: the replay makes it with what was advanced."""

        param_groups = ({"capturable": False},)

        def __init__(self, tensors):
            self.tensors, self.count, self.captured = tensors, 0, 0
            self.state = {param: dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), param) for param in tensors.params}

        def set_epoch(self, epoch):
            pass

        @torch.no_grad()
        def add(self, number):
            for param in self.tensors.params:
                param += number

        def step(self):
            self.count += 1
            self.add(self.count)

        def advance_captured_step(self):
            self.count += 1
            self.captured = self.count

        def replay(self):
            self.add(self.captured)

    class Timer(RehearsalTimer):
        rehearsal = False

        def capture(self, step):
            return step.__self__.replay

    monkeypatch.setattr(host_gpu, "small_tensors", lambda rehearsal: [("weight", None, (3,))])
    monkeypatch.setattr(host_gpu, "capturable_optimizer", lambda name, tensors, backend: Captured(tensors))
    row = host_gpu.replay_matches("mask=None", "cpu", Timer())
    assert row["identical"] is True, row


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
    host += [{"name": "torch fused", "backend": None, "moving": moving, "seconds": 250e-6} for moving in (False, True)]
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
    assert not bad["host time of 400 tensors, addresses moving: time / torch fused"]
    assert values["host time of 400 tensors, addresses fixed: time / torch fused"] == pytest.approx(55 / 250)
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
    recorder = Recorder(tmp_path)
    recorder.add("host_gpu", "rows", 1)
    (path,) = files.write_assembled(lines_of(recorder), tmp_path)

    def interrupted(self, text):
        with open(self, "w") as file:
            file.write(text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    recorder.add("host_gpu", "rows", 2)
    with pytest.raises(KeyboardInterrupt):
        files.write_assembled(lines_of(recorder), tmp_path)
    assert json.loads(path.read_text())["rows"] == [1]


def test_results_are_made_of_lines_also_of_a_line_that_was_cut_off(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.put("*", "machine", {"cpu": "x"})
    recorder.begin("step", "configs", "errors")
    recorder.add("step", "configs", {"rounds": 2}, "float32")
    recorder.add("step", "configs", {"rounds": 1}, "bfloat16")
    with open(recorder.path, "a") as file:
        file.write('\n{"benchmark": "step", "name": "configs", "key": "float32", "row": {"rounds": 7')  # killed
    recorder.add("step", "configs", {"rounds": 3}, "float32")  # by the process after it
    recorder.begin("step", "configs", "errors")
    for row in ("a", "a"):
        recorder.add("host", "rows", row)
    recorder.put("host", "load", 1)
    recorder.put("host", "load", 2)
    assert assembled(lines_of(recorder)) == {
        "step": {"machine": {"cpu": "x"}, "configs": [{"rounds": 3}, {"rounds": 1}], "errors": []},
        "host": {"machine": {"cpu": "x"}, "rows": ["a", "a"], "load": 2},
    }
