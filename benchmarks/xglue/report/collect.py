"""Collects the results of a folder, by configuration, method and seed, each method at its learning rate."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ..runs.learning_rate import best_lr, english_dev
from ..runs.results import TABLE, read_all
from ..scores import statistics
from ..settings import VARIED
from ..tasks import TASKS, Task
from ..titles import TITLES


@dataclass(frozen=True)
class Runs:
    """A method's runs at the rate that was chosen for it. results: by seed. tuning: the seeds by which the rate was
    chosen, none if it was given. by_rate: {rate: results by seed} of all that were run.
    """

    method: str
    lr: float
    tuning: tuple[int, ...]
    results: dict[int, dict]
    by_rate: dict[float, dict[int, dict]]

    def at(self, lr: float) -> "Runs":
        """Returns the runs at another rate."""
        return replace(self, lr=lr, results=self.by_rate[lr])

    def scores(self, column: str) -> dict[int, float]:
        """Returns {seed: test score in percent} of a language, of the mean over all ("avg") or over all but English
        ("zero").
        """
        found = {}
        for seed, result in self.results.items():
            own = {language: 100 * score["official"] for language, score in test_scores(result).items()}
            others = [value for language, value in own.items() if language != "en"]
            if column == "avg":
                found[seed] = statistics.mean(list(own.values()))
            elif column == "zero" and others:
                found[seed] = statistics.mean(others)
            elif column in own:
                found[seed] = own[column]
        return found


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but method, seed and learning rate: one table. name: unique among the groups. main:
    the one with the most runs of its task and model, which represents them where tasks are compared.
    """

    name: str
    configuration: dict
    runs: dict[str, Runs]
    main: bool

    @property
    def task(self) -> Task:
        return TASKS[self.configuration["task"]]

    @property
    def data_name(self) -> str:
        """Names the data set for readers: a stand-in does not get the name of the task that it replaces."""
        return f"XGLUE {self.task.folder}" if self.task.official else self.task.name

    @property
    def languages(self) -> list[str]:
        return list(self.configuration["languages"])

    def at(self, lr: float) -> "Group":
        """Returns every method at this rate, without those that were not run at it."""
        return replace(self, runs={name: runs.at(lr) for name, runs in self.runs.items() if lr in runs.by_rate})

    @property
    def rates(self) -> list[float]:
        """Returns every learning rate of any method."""
        return sorted({lr for runs in self.runs.values() for lr in runs.by_rate})

    @property
    def result(self) -> dict:
        """Returns any one of the results, for what all have in common."""
        return next(iter(next(iter(self.runs.values())).results.values()))

    def results(self) -> list[dict]:
        """Returns all results in the table."""
        return [result for runs in self.runs.values() for result in runs.results.values()]


def test_scores(result: dict) -> dict[str, dict[str, float]]:
    """Returns {language: scores} of the best epoch."""
    return result["test"][str(result["best_epoch"])]


def collect(folder: Path) -> list[Group]:
    """Returns the groups of all results in ``folder`` (see ``read_all``), official tasks first, in the order of
    tasks.TASKS.

    Raises:
        FileNotFoundError: no result there.
        ValueError: as ``read_all``.
    """
    found: dict[str, list[dict]] = {}
    for result in read_all(folder):
        configuration = {name: value for name, value in result["settings"].items() if name not in VARIED}
        found.setdefault(json.dumps(configuration, sort_keys=True), []).append(result)
    if not found:
        raise FileNotFoundError(f"no results in {folder}: expected TASK/CONFIGURATION/*.json or *{TABLE}")
    order = list(TASKS)
    # The configuration of a task with the most runs comes first: it represents the task.
    keys = sorted(found, key=lambda key: (order.index(json.loads(key)["task"]), -len(found[key]), key))
    pairs = [(json.loads(key)["task"], json.loads(key)["model"]) for key in keys]
    groups = []
    for place, (key, (task, model)) in enumerate(zip(keys, pairs)):
        number = pairs[: place + 1].count((task, model))
        name = task if number == 1 else f"{task}-{number}"
        models = {other for own, other in pairs if own == task}
        name = f"{name}-{Path(model).name}" if len(models) > 1 else name
        groups.append(Group(name, json.loads(key), _by_method(found[key]), number == 1))
    return groups


def _by_method(results: list[dict]) -> dict[str, Runs]:
    by_method: dict[str, dict[float, dict[int, dict]]] = {}
    for result in results:
        settings = result["settings"]
        by_method.setdefault(settings["method"], {}).setdefault(settings["lr"], {})[settings["seed"]] = result
    return {method: _chosen(method, by_method[method]) for method in TITLES if method in by_method}


def _chosen(method: str, by_lr: dict[float, dict[int, dict]]) -> Runs:
    scores = {lr: {seed: english_dev(result) for seed, result in own.items()} for lr, own in by_lr.items()}
    try:
        lr, tuning = best_lr(scores)
    except ValueError:  # rates of several sweeps that cannot be compared: takes the one with the most runs
        lr, tuning = max(by_lr, key=lambda rate: (len(by_lr[rate]), -rate)), []
    by_rate = {rate: dict(sorted(by_lr[rate].items())) for rate in sorted(by_lr)}
    return Runs(method, lr, tuple(tuning), by_rate[lr], by_rate)
