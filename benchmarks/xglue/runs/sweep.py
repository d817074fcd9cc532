"""Makes many runs: a grid of learning rates for every method on a few seeds, then all seeds at the best one.

Every worker looks at the folder of results, takes the first run that is neither there nor claimed, and repeats this
until none is left. So a sweep that is stopped or killed can continue, and two of them may share a folder.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..settings import Settings, check
from .learning_rate import best_lr, english_dev
from .lock import claim
from .results import read

POLL = 0.5  # seconds between looks at the folder
_CHOSEN: dict[tuple, float] = {}  # (plan, method, folder): learning rate, so that the grid is read once


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep. With one learning rate nothing is chosen. base: all settings but method, seed and lr."""

    base: Settings
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    tuning_seeds: tuple[int, ...]

    def tuning(self) -> list[Settings]:
        """Returns the runs of the grid, seed by seed, so that a sweep that is cut short has something of every
        method.
        """
        if len(self.lrs) == 1:
            return []
        return [
            replace(self.base, method=method, seed=seed, lr=lr)
            for seed in self.tuning_seeds for method in self.methods for lr in self.lrs
        ]  # fmt: skip

    def runs(self, results: Path) -> list[Settings]:
        """Returns the runs known so far: the grid, and those at the rate of each method whose part of the grid is
        done.
        """
        chosen = {method: self.lr(method, results) for method in self.methods}
        final = [
            replace(self.base, method=method, seed=seed, lr=chosen[method])
            for seed in self.seeds for method in self.methods if chosen[method] is not None
        ]  # fmt: skip
        return list(dict.fromkeys([*self.tuning(), *final]))

    def possible(self) -> list[Settings]:
        """Returns every run that there may be, checked. Raises ValueError for impossible values."""
        pairs = [(method, lr) for method in self.methods for lr in self.lrs]
        found = [replace(self.base, method=method, seed=self.seeds[0], lr=lr) for method, lr in pairs]
        for settings in found:
            check(settings)
        return found

    def total(self) -> int:
        """Returns the number of runs that there will be."""
        if len(self.lrs) == 1:
            return len(self.methods) * len(self.seeds)
        again = len(set(self.seeds) - set(self.tuning_seeds))
        return len(self.methods) * (len(self.lrs) * len(self.tuning_seeds) + again)

    def lr(self, method: str, results: Path) -> float | None:
        """Returns the method's learning rate; None while its part of the grid is not done."""
        if len(self.lrs) == 1:
            return self.lrs[0]
        if (self, method, results) in _CHOSEN:
            return _CHOSEN[self, method, results]
        scores: dict[float, dict[int, float]] = {}
        for settings in self.tuning():
            if settings.method == method:
                path = results / settings.file
                if not path.is_file():
                    return None
                scores.setdefault(settings.lr, {})[settings.seed] = english_dev(read(path))
        _CHOSEN[self, method, results] = best_lr(scores)[0]
        return _CHOSEN[self, method, results]


def work(
    plan: Plan, results: Path, options: dict, *, go_on: Callable[[], bool] = lambda: True, started: float | None = None
) -> list[Settings]:
    """Does what is left of the plan and not done by other processes. Returns the runs that failed (here or elsewhere).

    A run that raises leaves its traceback beside the place of its result. Only the next sweep tries it again.

    Args:
        options: of ``run_one``.
        go_on: asked before each run.
        started: time of the sweep's start; failures from before it do not count.
    """
    started = time.time() if started is None else started
    failed: list[Settings] = []
    while go_on():
        left = [settings for settings in plan.runs(results) if not (results / settings.file).is_file()]
        failed = [settings for settings in left if _failed_since(results / settings.file, started)]
        left = [settings for settings in left if settings not in failed]
        if not left:
            # The grid of a method that has failed runs is never complete: its other seeds have no learning rate.
            return failed
        if not any(_attempt(settings, results, options) for settings in left):
            time.sleep(POLL)  # other processes are working on all of them
    return failed


def _attempt(settings: Settings, results: Path, options: dict) -> bool:
    path = results / settings.file
    with claim(path.with_suffix(".lock")) as mine:
        if not mine:
            return False
        if path.is_file():
            return True
        failure = _failure(path)
        try:
            from .run import run_one  # only in workers, as transformers' Trainer takes seconds to import

            run_one(settings, results, **options)
            failure.unlink(missing_ok=True)
        except Exception:
            failure.write_text(traceback.format_exc(), encoding="utf-8")
            print(f"failed: {path.stem}, see {failure}", file=sys.stderr)
        return True


def _failure(path: Path) -> Path:
    return path.with_suffix(".failed.txt")


def _failed_since(path: Path, started: float) -> bool:
    try:
        return _failure(path).stat().st_mtime >= started
    except FileNotFoundError:
        return False


def sweep(plan: Plan, results: Path, options: dict, *, workers: int = 1, threads: int | None = None) -> int:
    """Does all of the plan with ``workers`` processes. A bar shows the runs done and the time left.

    Several GPUs are dealt out to the workers in turn. Several workers on one GPU are usual for small models.

    Args:
        options: of ``run_one``.
        threads: of torch in each worker; default: the cores shared out.

    Returns:
        The number of runs that are missing at the end. The reason of each is on stderr.
    """
    started, total = time.time() - 1, plan.total()
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    done = lambda: sum((results / settings.file).is_file() for settings in plan.runs(results))
    context = multiprocessing.get_context("spawn")
    (results / "logs").mkdir(parents=True, exist_ok=True)
    processes = []
    for number in range(workers):
        arguments = (plan, results, options, number, threads, started, os.getpid())
        processes.append(context.Process(target=_worker, args=arguments, name=f"worker-{number}"))
    before = done()
    try:
        with tqdm(total=total, initial=before, desc=plan.base.task, unit="run", smoothing=0) as bar:
            for process, gpu in zip(processes, deal_gpus(workers, options.get("device"))):
                with _visible(gpu):  # before the process loads CUDA
                    process.start()
            while any(process.is_alive() for process in processes):
                time.sleep(POLL)
                bar.n = done()
                bar.refresh()
            bar.n = done()
    except BaseException:
        for process in processes:
            if process.is_alive():
                process.terminate()
        raise
    finally:
        for process in processes:
            if process.pid is not None:
                process.join()
    for process in processes:
        if process.exitcode:
            print(f"{process.name} ended with exit code {process.exitcode}; see {results / 'logs'}", file=sys.stderr)
    for path in sorted(results.glob(f"{plan.base.task}/*/*.failed.txt")):
        if path.stat().st_mtime >= started:
            print(f"failed: {path.name.removesuffix('.failed.txt')}, see {path}", file=sys.stderr)
    return total - done()


def deal_gpus(workers: int, device: str | None) -> list[str | None]:
    """Returns CUDA_VISIBLE_DEVICES of each worker: the visible GPUs in turn; None, unchanged, if there is no choice."""
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if count < 2:
        return [None] * workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(number) for number in range(count)]
    return [visible[number % count] for number in range(workers)]


@contextmanager
def _visible(gpu: str | None) -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _worker(plan: Plan, results: Path, options: dict, number: int, threads: int, started: float, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    log = (results / "logs" / f"worker-{number}.log").open("a", encoding="utf-8", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    failed = work(plan, results, {**options, "progress": False}, go_on=lambda: os.getppid() == parent, started=started)
    if failed:
        print(f"{len(failed)} runs failed", file=sys.stderr)
