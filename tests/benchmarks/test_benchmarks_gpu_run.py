"""The run on a GPU: a stage that raises, hangs or is killed costs itself only, the archive holds every row at any
moment, a pack of compiled code is used where it fits, and both plans are within their budgets.
"""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from cases import require

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.common.rows import assembled  # noqa: E402
from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import packed  # noqa: E402
from benchmarks.gpu.packed import Pack  # noqa: E402
from benchmarks.gpu.stages import Measurement, Program, Programs, plan  # noqa: E402
from benchmarks.render import __main__ as render  # noqa: E402

PLANTED = """
import os, signal, subprocess, sys, time

def row(recorder, timer, seconds, name):
    recorder.add("planted", "rows", {"name": name, "seconds": seconds, "pid": os.getpid()})
    return 0

def explode(recorder, timer, seconds):
    row(recorder, timer, seconds, "before the explosion")
    raise ValueError("of no use")

def die(recorder, timer, seconds):
    row(recorder, timer, seconds, "before the end")
    with open(recorder.path, "a") as file:
        file.write('{"benchmark": "planted", "na')
    os.kill(os.getpid(), signal.SIGKILL)

def hang(recorder, timer, seconds, mark):
    row(recorder, timer, seconds, "before the hang")
    subprocess.run([sys.executable, "-c", f"import time; time.sleep(5); open({mark!r}, 'w')"])

def lose(recorder, timer, seconds):
    timer.synchronize = lambda: 1 / 0  # as after an illegal access
    raise RuntimeError("CUDA error: an illegal memory access")

def fail_rows(recorder, timer, seconds):
    return 3
"""


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "START", 1.0)  # a hang is noticed sooner
    return tmp_path


def good(name: str, seconds: float = 30.0) -> Measurement:
    return Measurement(name, seconds, "planted:row", {"name": name})


def python(name: str, code: str, **environment: str) -> Program:
    return Program(name, (sys.executable, "-c", code), environment)


def carried_out(stages, folder: Path, budget: float = 200.0) -> tuple[int, dict, str]:
    """(exit code, what the archive holds, the log in it)."""
    (folder / "out").mkdir()
    code = gpu.run(stages, budget, folder / "out", True, Pack(folder / "no pack"))
    return (code, *read(folder / "out" / gpu.ARCHIVE))


def read(path: Path) -> tuple[dict, str]:
    with tarfile.open(path) as archive:
        rows, log = (archive.extractfile(name).read().decode() for name in ("rows.jsonl", "log.txt"))
    return assembled(rows.splitlines()), log


def outcome(found: dict) -> dict[str, str]:
    return {each["stage"]: each["status"] for each in found["gpu_run"]["stages"]}


# --- stages that fail -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_measurement_that_raises_hangs_or_is_killed_leaves_the_others(planted):
    mark = planted / "child survived"
    stages = [
        good("first"),
        Measurement("raises", 5.0, "planted:explode"),
        Measurement("no such", 5.0, "planted:nothing"),
        Measurement("rows", 5.0, "planted:fail_rows"),
        good("second"),
        Measurement("killed", 5.0, "planted:die"),
        good("third"),
        Measurement("hangs", 1.0, "planted:hang", {"mark": str(mark)}),
        good("fourth"),
        Measurement("lost", 5.0, "planted:lose"),
        good("fifth"),
    ]
    code, found, log = carried_out(stages, planted)
    assert code == 1 and outcome(found) == {
        "first": "ok", "raises": "failed", "no such": "failed", "rows": "failed", "second": "ok", "killed": "failed",
        "third": "ok", "hangs": "over its time", "fourth": "ok", "lost": "failed", "fifth": "ok",
    }  # fmt: skip
    names = [row["name"] for row in found["planted"]["rows"]]
    assert names == ["first", "before the explosion", "second", "before the end", "third", "before the hang", "fourth",
                     "fifth"]  # fmt: skip
    processes = {row["name"]: row["pid"] for row in found["planted"]["rows"]}
    assert processes["first"] == processes["second"] == processes["before the end"]  # one import for all of them
    assert len(set(processes.values())) == 4  # and another only after those that it cannot survive
    why = {each["stage"]: each.get("why", "") for each in found["gpu_run"]["stages"]}
    assert why["raises"] == "ValueError: of no use" and "nothing" in why["no such"] and why["rows"] == "3 rows"
    assert why["killed"] == "ended by SIGKILL" and why["hangs"].startswith("killed after ")
    assert "ValueError: of no use" in log and "raises: failed in" in log
    assert found["planted"]["rehearsal"] is True and found["planted"]["machine"]["torch"]
    time.sleep(max(0.0, 6 - (found["gpu_run"]["stages"][8]["seconds"])))
    assert not mark.exists(), "what a killed stage had started went on"


def test_programs_run_side_by_side_and_each_fails_for_itself(planted):
    meet = f"import pathlib, time; folder = pathlib.Path({str(planted)!r}); name = {{!r}}; (folder / name).touch()\n"
    meet += "while not all((folder / one).exists() for one in 'ab'): time.sleep(0.01)"
    stages = [
        Programs("all", 20.0, (
            python("meets b", meet.format("a")),
            python("meets a", meet.format("b")),
            python("fails", "print('about to'); raise SystemExit('of no use')"),
            python("told", "import os; assert os.environ['A'] == 'b'", A="b"),
        )),
        Programs("late", 1.0, (python("hangs", "print('begun'); import time; time.sleep(60)"),)),
        Programs("after", 5.0, (python("is there", f"import benchmarks; print(benchmarks.__file__, {str(ROOT)!r})"),)),
    ]  # fmt: skip
    began = time.monotonic()
    code, found, log = carried_out(stages, planted, 26.0)
    assert code == 1 and time.monotonic() - began < 26
    assert outcome(found) == {"meets b": "ok", "meets a": "ok", "fails": "failed", "told": "ok",
                              "hangs": "over its time", "is there": "ok"}  # fmt: skip
    told = {each["stage"]: each for each in found["gpu_run"]["stages"]}
    assert told["fails"]["output"] == ["about to", "of no use"] and told["fails"]["why"] == "exit code 1"
    assert told["hangs"]["output"] == ["begun"]
    assert str(ROOT) not in log  # results are published


@pytest.mark.slow
def test_the_archive_is_renewed_after_every_row_and_survives_the_run(planted):
    """Killed at any moment the run leaves an archive that can be read; a run that is told to stop ends its stages."""
    stages = "[Measurement('row', 30.0, 'planted:row', {'name': 'row'}), Measurement('waits', 500.0, 'planted:hang', "
    stages += "{'mark': sys.argv[1] + '/mark'}), Programs('never', 1.0, ())]"
    code = "import sys; from pathlib import Path; from benchmarks.gpu import __main__ as gpu; "
    code += "from benchmarks.gpu.stages import *; from benchmarks.gpu.packed import Pack; "
    code += f"sys.exit(gpu.run({stages}, 600.0, Path(sys.argv[1]), True, Pack(Path('none'))))"
    for number in (signal.SIGKILL, signal.SIGTERM):
        out = planted / number.name
        out.mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))}
        process = subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment, stdout=subprocess.DEVNULL)
        deadline, names = time.monotonic() + 60, []
        while "before the hang" not in names and time.monotonic() < deadline:
            time.sleep(0.1)
            if (out / gpu.ARCHIVE).exists():
                found, _ = read(out / gpu.ARCHIVE)  # whole, whenever it is read
                names = [row["name"] for row in found.get("planted", {}).get("rows", ())]
        assert names == ["row", "before the hang"]
        assert outcome(found) == {"row": "ok"}
        process.send_signal(number)
        assert process.wait(20) == (128 + number if number == signal.SIGTERM else -number)
        assert read(out / gpu.ARCHIVE)[0]["planted"]["rows"] == found["planted"]["rows"]
    time.sleep(6)
    assert not (out / "mark").exists(), "what a stopped run had started went on"


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget, stages", [(500.0, 10), (200.0, 6)])
def test_a_plan_fits_its_budget_and_begins_with_what_only_a_gpu_shows(budget, stages):
    real, rehearsed = plan(budget, False, 7), plan(budget, True, 7)
    assert [stage.name for stage in real] == [stage.name for stage in rehearsed] and len(real) == stages
    assert sum(stage.seconds for stage in real) <= budget
    first = real[0].programs[0]
    assert first.name == "test_triton_gpu" and first.command[-1].endswith("test_triton_gpu.py")
    for stage in real:
        if isinstance(stage, Measurement):
            module, name = stage.call.split(":")
            function = getattr(importlib.import_module(module), name)
            inspect.signature(function).bind("recorder", "timer", stage.seconds, **stage.arguments)
            continue
        for program in stage.programs:
            assert not {"--rehearse", "--collect-only", "cpu"} & set(program.command)
            assert all((ROOT / word).exists() for word in program.command if word.startswith("tests/"))
            if program.name.startswith("verify"):
                options = dict(zip(program.command, program.command[1:]))
                assert options["--device"] == "cuda" and options["--seed"] == "7"
                assert 5 < stage.seconds - float(options["--seconds"]) < 25  # its table comes before it is killed
            assert program.name != "bench" or len(stage.programs) == 1  # what measures has the GPU to itself


def test_the_long_plan_is_not_given_to_a_short_budget():
    assert len(plan(349.0, False, 0)) < len(plan(350.0, False, 0))


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    for arguments, error in (([], "no GPU"), (["--rehearse", "--only", "lunch"], "no stage is called 'lunch'")):
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--output", str(tmp_path), *arguments])
        with pytest.raises(SystemExit, match=error):
            gpu.main()
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--list", "--only", "modes", "bench"])
    assert gpu.main() == 0
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()] == ["modes", "bench"]


def test_an_archive_without_a_measurement_is_refused(planted):
    _, found, _ = carried_out([Programs("none", 1.0, (python("ok", "pass"),))], planted, 3.0)
    archive = planted / "out" / gpu.ARCHIVE
    if "machine" not in found["gpu_run"]:  # the measuring process was killed before it could tell
        with pytest.raises(SystemExit, match="does not say of which machine it is"):
            render.main(["--archive", str(archive)])


# --- the pack ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pack(tmp_path, monkeypatch) -> Path:
    """A pack of libraries and two kernels, beside a source tree of its own."""
    tree, folder = tmp_path / "tree", tmp_path / "pack"
    for path, text in (("csrc/a.h", "a"), ("setup.py", "s"), ("graddrop_kernels/_cpu.so", "old")):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    monkeypatch.setattr(packed, "ROOT", tree)
    monkeypatch.setattr(packed, "_compute_capability", lambda: "9.0")
    for path in ("triton/KEY1/k.cubin", "triton/KEY2/k.cubin", "_cpu.so", "_cuda.so"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"packed {path}")
    facts = {"commit": "abc", "architecture": "9.0", "sources": packed.digest_of_sources(), "seed": 5}
    (folder / packed.FACTS).write_text(json.dumps(facts))
    return folder


def test_a_pack_is_used_by_itself(pack, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADDROP_GPU_PACK", str(pack))
    found = Pack()
    environment, lines = found.use(True, tmp_path / "cache")
    assert lines == ["pack: commit abc, architecture 9.0, seed 5", "_cpu.so and _cuda.so are the pack's"]
    for name in ("_cpu.so", "_cuda.so"):
        assert (tmp_path / "tree" / "graddrop_kernels" / name).read_text() == f"packed {name}"
    assert environment["GRADDROP_COMMIT"] == "abc"
    cache = Path(environment["TRITON_CACHE_DIR"])
    assert cache == tmp_path / "cache"
    (cache / "KEY3").mkdir()
    (cache / "KEY3" / "k.cubin").write_text("compiled in the run")
    assert found.kernels() == {"packed": 2, "added": 1} and not (pack / "triton" / "KEY3").exists()


@pytest.mark.parametrize("change", ["sources", "gpu", "rehearsal", "none"])
def test_libraries_that_do_not_fit_are_left_out_with_a_line(change, pack, tmp_path, monkeypatch):
    if change == "sources":
        (tmp_path / "tree" / "csrc" / "a.h").write_text("changed")
    if change == "gpu":
        monkeypatch.setattr(packed, "_compute_capability", lambda: "8.0")
    if change == "none":
        pack = tmp_path / "missing"
    _, lines = Pack(pack).use(change != "rehearsal", tmp_path / "cache")
    assert (tmp_path / "tree" / "graddrop_kernels" / "_cpu.so").read_text() == "old"
    assert not (tmp_path / "tree" / "graddrop_kernels" / "_cuda.so").exists()
    said = {
        "sources": "its libraries are of other sources and not used; make gpu-pack anew",
        "gpu": "its libraries are for compute capability 9.0, and this is 8.0: not used",
        "none": "no pack in missing/: kernels are compiled when needed (make gpu-pack makes one)",
        "rehearsal": "pack: commit abc, architecture 9.0, seed 5",
    }
    assert lines[-1] == said[change]


@pytest.mark.slow
def test_the_pack_holds_the_kernels_of_verify_and_of_what_is_measured():
    """Of all five kinds of kernels, for the dtypes of every mode. How they are found again: test_verify_ahead.py."""
    require("cpu")
    pytest.importorskip("triton")
    code = (
        "import collections, json; from benchmarks.gpu import pack_kernels\n"
        "found = pack_kernels.find_kernels(7, 90)._found.values()\n"
        "print(json.dumps(collections.Counter(function.fn.__name__ for function, _ in found)))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    names = ("masked_adamw", "prologue", "sum_of_squares", "mask_gradients", "mask")
    assert counts.keys() == {f"{name}_kernel" for name in names}
    assert counts["masked_adamw_kernel"] > 80 and min(counts.values()) >= 3, counts
