"""Everything on a GPU machine by one command, within a number of seconds: tests, verify, measurements.

    python -m benchmarks.gpu --budget 500       everything
    python -m benchmarks.gpu --budget 200       what matters most
    python -m benchmarks.gpu --rehearse         the same on tiny CPU tensors

Writes run.tar.gz, anew after every row, so that a run that is killed leaves what it has. Figures and tables are made
elsewhere: `python -m benchmarks.render --archive run.tar.gz`. A stage that fails, hangs or is killed costs itself only.
`make gpu-pack` compiles beforehand, on a machine without a GPU, what would else be compiled in these seconds.
"""

import argparse
import functools
import os
import queue
import secrets
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from ..common.rows import Recorder
from .packed import ROOT, Pack
from .processes import Process
from .stages import Measurement, Program, Programs, Stage, plan

BUDGET = 500.0  # seconds
ARCHIVE, LOG = "run.tar.gz", "log.txt"
TO_MEASURE = 0.85  # of a stage's seconds; the rest is for the last round, which has then begun
LATE, START = 1.5, 12.0  # a stage is killed after so many times its seconds and the seconds of a process' start
PAUSE = 0.2  # seconds between two looks for new rows


class Archive:
    """Packs the rows and the log into one file, whenever there are more."""

    def __init__(self, folder: Path, target: Path):
        self._folder, self._target = folder, target
        self._packed: tuple = ()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Packs the last rows."""
        self._end.set()
        self._thread.join()
        self._renew()

    def _watch(self) -> None:
        while not self._end.wait(PAUSE):
            self._renew()

    def _renew(self) -> None:
        files = sorted(self._folder.iterdir())
        state = tuple((path.name, path.stat().st_size) for path in files)
        if state == self._packed:
            return
        unfinished = self._target.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w:gz", compresslevel=1) as archive:
            for path in files:
                archive.add(path, path.name)
        unfinished.replace(self._target)  # never half a file
        self._packed = state


class Run:
    """Carries out stages, each by its own end, and records what became of them."""

    def __init__(self, stages: list[Stage], budget: float, folder: Path, rehearse: bool, environment: dict[str, str]):
        self.stages, self.budget, self.folder, self.rehearse = stages, budget, folder, rehearse
        self.recorder, self.began = Recorder(folder), time.monotonic()
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
        self.measuring: Process | None = None
        self.is_ready = False
        self.running: list[Process] = []
        self.failed: list[str] = []
        self._lock = threading.Lock()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        """Prints a line with the time, and keeps it in the log."""
        line = f"[{self.elapsed:6.1f} s] {self.plain(text)}"
        with self._lock, open(self.folder / LOG, "a", encoding="utf-8") as log:
            print(line, flush=True)
            log.write(f"{line}\n")

    def plain(self, text: str) -> str:
        """Removes the paths of this machine, as results are published."""
        for path, name in ((self.folder, "run"), (f"{ROOT}/", ""), (ROOT, "."), (sys.prefix, "python")):
            text = text.replace(str(path), name)
        return text

    def start(self, name: str, command, environment: dict[str, str] | None = None) -> Process:
        environment = {**self.environment, **(environment or {})}
        process = Process(command, environment, ROOT, lambda line: self.say(f"{name}: {line}"))
        self.running.append(process)
        return process

    def carry_out(self) -> None:
        """Carries out all stages. One that is late is killed, at the latest where the share of the next one begins."""
        self.recorder.begin("gpu_run", "stages")
        self.recorder.put("gpu_run", "budget", self.budget)
        self._start_measuring()  # it imports while the tests run
        whole, planned = sum(stage.seconds for stage in self.stages), 0.0
        for stage in self.stages:
            planned += stage.seconds
            seconds = self.budget * stage.seconds / whole
            end = min(self.budget * planned / whole, self.elapsed + LATE * seconds + START)
            self.say(f"{stage.name}: {seconds:.0f} s, by {end:.0f} s")
            if isinstance(stage, Measurement):
                self._measure(stage, seconds, end)
            else:
                self._run_side_by_side(stage, end)
        self.stop()

    def stop(self) -> None:
        """Kills what still runs."""
        for process in self.running:
            process.kill()

    def _start_measuring(self) -> Process:
        command = [sys.executable, "-m", "benchmarks.gpu.measure", str(self.folder)]
        self.measuring = self.start("measure", command + ["--rehearse"] * self.rehearse)
        self.is_ready = False
        return self.measuring

    def _measure(self, stage: Measurement, seconds: float, end: float) -> None:
        began, process = self.elapsed, self.measuring or self._start_measuring()
        try:
            if not self.is_ready:
                self.is_ready = process.answer(end - self.elapsed) is not None
            seconds = TO_MEASURE * min(seconds, end - self.elapsed)
            process.ask({"call": stage.call, "seconds": seconds, "arguments": stage.arguments})
            told = process.answer(end - self.elapsed) if self.is_ready else None
        except queue.Empty:
            told = {"status": "over its time", "why": f"killed after {self.elapsed - began:.0f} s"}
            process.kill()
            self.measuring = None
        if told is None:
            process.kill()  # what it has started
            self.measuring = None
            told = {"status": "failed", "why": process.ended() or "it has ended", "output": list(process.tail)}
        self._record(stage.name, began, told)

    def _run_side_by_side(self, stage: Programs, end: float) -> None:
        began, cores = self.elapsed, os.cpu_count() or 1
        several = len(stage.programs) > 1  # each as if it had the machine would be slower for all
        threads = {"OMP_NUM_THREADS": f"{max(1, cores // len(stage.programs))}"} if several else {}
        processes = [(one, self.start(one.name, one.command, threads | one.environment)) for one in stage.programs]
        watchers = [threading.Thread(target=self._watch, args=(*each, began, end)) for each in processes]
        for watcher in watchers:
            watcher.start()
        for watcher in watchers:
            watcher.join()

    def _watch(self, program: Program, process: Process, began: float, end: float) -> None:
        try:
            process.answer(end - self.elapsed)
            told = {"status": "failed" if process.ended() else "ok"}
        except queue.Empty:
            told = {"status": "over its time"}
        process.kill()
        if told["status"] != "ok":
            told |= {"why": process.ended(), "output": list(process.tail)}
        self._record(program.name, began, told)

    def _record(self, name: str, began: float, told: dict) -> None:
        seconds = round(self.elapsed - began, 1)
        told["output"] = [self.plain(line) for line in told.get("output", ())]
        self.recorder.add("gpu_run", "stages", {"stage": name, "began": round(began, 1), "seconds": seconds, **told})
        if told["status"] != "ok":
            self.failed.append(name)
        self.say(f"{name}: {told['status']} in {seconds:.1f} s" + (f" ({told['why']})" if told.get("why") else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for everything (default: 500)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of run.tar.gz (default: $OUT, or gpu-run)")
    parser.add_argument("--rehearse", action="store_true", help="tiny CPU tensors, a host clock: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages by their names")
    parser.add_argument("--list", action="store_true", help="names the stages with their seconds")
    options = parser.parse_args()
    pack = Pack()
    stages = plan(options.budget, options.rehearse, pack.facts.get("seed", secrets.randbits(31)))
    unknown = set(options.only or ()) - {stage.name for stage in stages}
    if unknown:
        raise SystemExit(f"no stage is called {', '.join(map(repr, sorted(unknown)))}; --list names them")
    stages = [stage for stage in stages if stage.name in (options.only or [stage.name])]
    if options.list:
        for stage in stages:
            print(f"{stage.seconds:4.0f} s  {stage.name}")
        return 0
    if not options.rehearse and not shutil.which("nvidia-smi"):
        raise SystemExit("no GPU: there is no nvidia-smi; --rehearse shows that everything runs")
    output = (options.output or Path(os.environ.get("OUT") or "gpu-run")).resolve()
    output.mkdir(parents=True, exist_ok=True)
    return run(stages, options.budget, output, options.rehearse, pack)


def run(stages: list[Stage], budget: float, output: Path, rehearse: bool, pack: Pack) -> int:
    """Carries the stages out, with the archive in ``output``. Returns 0, or 1 if one of them was not ok."""
    temporary = functools.partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)
    with temporary() as folder, temporary() as cache:
        environment, lines = pack.use(not rehearse, Path(cache))
        one = Run(stages, budget, Path(folder), rehearse, environment)

        def interrupted(number, _frame) -> None:
            one.stop()
            sys.exit(128 + number)

        before = {number: signal.signal(number, interrupted) for number in (signal.SIGTERM, signal.SIGINT)}
        for line in (f"{budget:.0f} s, into {output.name}/{ARCHIVE}", *lines):
            one.say(line)
        archive = Archive(Path(folder), output / ARCHIVE)
        try:
            one.carry_out()
            one.recorder.put("gpu_run", "pack", pack.facts | {"found": pack.kernels()})
            one.say(f"done; not ok: {', '.join(one.failed)}" if one.failed else "done, everything ok")
        finally:
            archive.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    return 1 if one.failed else 0


if __name__ == "__main__":
    sys.exit(main())
