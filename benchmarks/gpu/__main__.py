"""Everything on a GPU machine by one command: build csrc, test, verify, measure, draw, render. In under 9 minutes.

    python -m benchmarks.gpu                    into results/<GPU>/
    python -m benchmarks.gpu --rehearse         the same on tiny CPU tensors, into a temporary folder

Every part is a process of its own: one that fails or runs over its time is recorded, the others go on, and the exit
code is 1. Results are written while they are made, so that a run that is killed keeps what it has; gpu_run.json says
what ran, for how long, and what it printed when it failed.
"""

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.machine import ROOT, Load, facts_once
from ..common.results import gpu_arguments, gpu_folder, write_gpu

BUDGET = 520.0  # seconds: 9 minutes less 20 seconds to spare
FOR_THE_END = 25.0  # figures, tables
LEAST = 5.0  # seconds; a part that would have less is left out
SHARED_TESTS = ("test_backends_agree.py", "test_layout.py")  # test every backend, or those of GRADDROP_TEST_BACKENDS
TAIL = 60  # lines kept of a part's output
GRACE = 1.5  # a part is killed after this many times its seconds; compiling is not in its own budget


@dataclass(frozen=True)
class Part:
    """``seconds``: planned, on one H200; scaled down if less is left. ``command`` is made with the seconds it has."""

    name: str
    seconds: float
    command: list[str]
    budgeted: bool = False  # takes --budget, --out and --rehearse
    environment: tuple[tuple[str, str], ...] = ()


def gpu_tests() -> list[str]:
    """Lists the test files of what runs on a GPU: none of the compilers' output, of the interpreter, of this script."""
    folder = ROOT / "tests" / "backends"
    found = [path for name in ("cuda", "triton") for path in folder.glob(f"test_{name}_*.py")]
    found = [path for path in found if not path.stem.endswith(("_contract", "_interpreter"))]
    found += [path for name in SHARED_TESTS if (path := folder / name).exists()]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def architecture() -> str:
    """Returns "90" for an H100 or H200: code is compiled for this GPU only."""
    return "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "90"


def parts(rehearse: bool, folder: Path) -> list[Part]:
    """Lists the parts, the most wanted first, in case the time runs out."""
    python = sys.executable

    def benchmark(name: str, seconds: float, module: str, *arguments: str) -> Part:
        command = [python, "-m", f"benchmarks.gpu.{module}", "--out", str(folder), *arguments]
        return Part(name, seconds, command + (["--rehearse"] if rehearse else []), budgeted=True)

    compiled = {"GRADDROP_CUDA_ARCHS": architecture(), "GRADDROP_FORCE_CUDA": "1"}
    build = {"GRADDROP_NO_EXT": "1"} if rehearse else compiled
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "--maxfail=20", *gpu_tests(), *(["--collect-only"] if rehearse else [])]
    on_gpu = {} if rehearse else {"GRADDROP_TEST_BACKENDS": "triton cuda"}
    micro = [*pytest, "benchmarks/test_micro.py", "-k", "gpu and GradFreeze" if rehearse else "gpu"]
    on_cpu = {"GRADDROP_REHEARSE": "1"} if rehearse else {}
    verify = [python, "-m", "graddrop_kernels", "verify"]
    bench = [python, "-m", "graddrop_kernels", "bench", "--quick"]
    bench += ["--device", "cpu"] if rehearse else []
    one_mode = ("--modes", "float32") if rehearse else ()
    compiling = 100 if rehearse else 50  # DeepSpeed's FusedAdam, for the CPU: 45 s of a core
    planned = [
        Part("build", 90, [python, "setup.py", "-q", "build_ext", "--inplace"], environment=tuple(build.items())),
        Part("info", 15, [python, "-m", "graddrop_kernels", "info"]),
        Part("verify, quick", 20, verify + ["--help" if rehearse else "--quick"]),
        benchmark("step, XLM-R-large", 65, "step", "--work", "xlmr_large"),
        benchmark("host, launches, graphs", 25, "host"),
        benchmark("modes", 40, "modes"),
        benchmark("sweeps", 45, "sweeps", *one_mode),
        Part("tests", 70, tests, environment=tuple(on_gpu.items())),
        benchmark("step, other models", 40, "step", "--work", "xlmr_base", "llama_1b", "one_tensor"),
        benchmark("slow peers", compiling, "step", "--work", "xlmr_large", "--modes", "float32", "--slow-peers"),
        Part("micro", 20, micro, environment=tuple(on_cpu.items())),
        Part("bench, quick", 15, bench),
        Part("verify", 20, verify),
    ]
    return planned[:-1] if rehearse else planned  # one verify --help is enough


def end_parts(rehearse: bool, folder: Path) -> list[Part]:
    python, results = [sys.executable, "-m"], ["--results", str(folder.parent)]
    plots = [*python, "benchmarks.render.figures", *results, "--machine", folder.name]
    tables = [*python, "benchmarks.render", *results, "--machine", folder.name]
    extra = ["--rehearsal"] if rehearse else []
    return [Part("figures", 15, plots + extra), Part("tables", 5, tables + extra)]


class Run:
    """Runs the parts and keeps gpu_run.json up to date."""

    def __init__(self, options, folder: Path):
        self.options, self.folder, self.began = options, folder, time.monotonic()
        self.load, self.done = Load(), []
        self.child: subprocess.Popen | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def plain(self, text: str) -> str:
        """Removes the paths of this machine, as results are published."""
        for path, name in ((self.folder, self.folder.name), (f"{ROOT}/", ""), (sys.prefix, "python")):
            text = text.replace(str(path), name)
        return text

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:5.0f} s] {text}", flush=True)

    def carry_out(self, part: Part, reserve: float, scale: float = 1.0) -> None:
        left = self.options.budget - reserve - self.elapsed
        seconds = min(part.seconds * scale, left)
        entry = {"part": part.name, "command": " ".join(["python", *part.command[1:]]), "began": round(self.elapsed, 1)}
        entry["command"] = self.plain(entry["command"])
        if seconds < min(LEAST, part.seconds * scale):
            self.record(entry | {"status": "left out", "why": f"{max(0.0, left):.0f} s left of the budget"})
            return
        self.say(f"{part.name}: at most {min(GRACE * seconds + 10, left):.0f} s")
        command = part.command
        if part.budgeted:
            command = [*command, "--budget", f"{0.8 * seconds:.0f}"]
        self.record(entry | self.call(command, dict(part.environment), min(GRACE * seconds + 10, max(left, LEAST))))

    def call(self, command: list[str], environment: dict[str, str], limit: float) -> dict:
        """Runs one process and shows what it prints. Returns {"status", "seconds", and of a failure "output"}."""
        start = time.monotonic()
        lines: deque[str] = deque(maxlen=TAIL)
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # Of this run alone: killed while it compiles, a peer leaves a lock for which all later ones would wait.
        extensions = ROOT / "build" / f"torch_extensions-{os.getpid()}"
        own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
        environment = {**os.environ, **own, **environment}
        try:
            self.child = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"status": "failed", "seconds": 0.0, "output": [str(error)]}
        late = threading.Event()
        watch = threading.Timer(limit, lambda: (late.set(), self.kill()))
        watch.start()
        for line in self.child.stdout:
            lines.append(self.plain(line.rstrip()))
            if "USDT:" not in line:  # noise of torch's profiler
                self.say(f"    {line.rstrip()}")
        code = self.child.wait()
        watch.cancel()
        self.child = None
        result = {"status": "ok" if code == 0 else "failed", "seconds": round(time.monotonic() - start, 1)}
        if late.is_set():
            result |= {"status": "over its time", "why": f"killed after {limit:.0f} s"}
        return result if result["status"] == "ok" else result | {"exit_code": code, "output": list(lines)}

    def kill(self) -> None:
        """Kills the child with everything that it started: compilers, pools."""
        if self.child is not None and self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)

    def record(self, entry: dict) -> None:
        self.done.append(entry)
        self.say(f"{entry['part']}: {entry['status']}" + (f" ({entry['why']})" if "why" in entry else ""))
        results = {"budget": self.options.budget, "elapsed": round(self.elapsed, 1), "load": self.load.report()}
        write_gpu("gpu_run", self.options, results | {"parts": self.done})
        if self.options.archive:
            self.archive()

    def archive(self) -> None:
        """Packs all results so far into one file, for a machine from which few files come back."""
        unfinished = self.options.archive.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(self.folder, self.folder.name)
        unfinished.replace(self.options.archive)


def main() -> int:
    parser = gpu_arguments(__doc__)
    parser.set_defaults(budget=BUDGET)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by their names, figures and tables always")
    parser.add_argument("--skip", nargs="+", metavar="PART", default=[], help="parts by their names")
    parser.add_argument("--archive", type=Path, metavar="FILE.tar.gz", help="the results in one file, part by part")
    parser.add_argument("--list", action="store_true", help="names the parts with their seconds")
    options = parser.parse_args()
    if options.list:
        for part in parts(options.rehearse, Path("results")):
            print(f"{part.seconds:4.0f} s  {part.name}")
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --rehearse shows that everything runs")
    folder = options.out = gpu_folder(options).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = parts(options.rehearse, folder)
    unknown = {*(options.only or ()), *options.skip} - {part.name for part in chosen}
    if unknown:
        raise SystemExit(f"no part is called {', '.join(map(repr, sorted(unknown)))}; --list names them")
    chosen = [part for part in chosen if part.name not in options.skip and part.name in (options.only or [part.name])]
    run = Run(options, folder)

    def stop(number, _frame) -> None:
        run.kill()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    run.say(f"into {folder}, budget {options.budget:.0f} s")
    for number, part in enumerate(chosen):
        left = options.budget - FOR_THE_END - run.elapsed
        facts_once.cache_clear()  # the build changes them
        run.carry_out(part, FOR_THE_END, max(0.0, min(1.0, left / sum(part.seconds for part in chosen[number:]))))
    for part in end_parts(options.rehearse, folder):
        run.carry_out(part, 0.0)
    failed = [entry["part"] for entry in run.done if entry["status"] != "ok"]
    run.say(f"done; not ok: {', '.join(failed)}" if failed else "done, everything ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
