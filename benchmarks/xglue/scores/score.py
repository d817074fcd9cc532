"""Scores a folder of official prediction files."""

from collections.abc import Sequence
from pathlib import Path

from ..examples.load import load
from ..tasks import TASKS, languages
from . import metrics, predictions

Scores = dict[str, dict[str, dict[str, float]]]


def score_folder(
    folder: str | Path, tasks: Sequence[str] | None = None, split: str = "test", root: str | Path | None = None,
    only: Sequence[str] | None = None,
) -> Scores:  # fmt: skip
    """Returns {task: {language: metrics.score(...), ..., "avg": {"official": ..., ...}}}.

    "avg" is the plain mean over the languages, English included, as the evaluator's.

    Args:
        folder: has {TASK}/{language}.prediction.
        tasks: names out of tasks.TASKS; default: those that have a folder.
        split: "dev" or "test".
        root: as examples.load.load's.
        only: languages, of every task; default: all that a task has in this split, as the evaluator.

    Raises:
        FileNotFoundError, ValueError: as predictions.read and load; no task has a folder; an unknown task.
    """
    if split not in ("dev", "test"):
        raise ValueError(f"split {split!r}: must be dev or test; nobody predicts the training data")
    if tasks is None:
        tasks = [task.name for task in TASKS.values() if (Path(folder) / task.folder).is_dir()]
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"tasks: {unknown[0]!r} is none of {', '.join(TASKS)}")
    if not tasks:
        expected = ", ".join(task.folder for task in TASKS.values())
        raise FileNotFoundError(f"{folder}: no folder of a task in it; their names are {expected}")
    return {name: _score_task(folder, name, split, root, only) for name in tasks}


def _score_task(
    folder: str | Path, name: str, split: str, root: str | Path | None, only: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    task, scores = TASKS[name], {}
    for language in dict.fromkeys(only or languages(task, split)):
        examples = load(task, language, split, root)
        predicted = predictions.read(folder, task, language, examples)
        scores[language] = metrics.score(task, language, examples, predicted)
    keys = next(iter(scores.values()))
    return {**scores, "avg": {key: sum(own[key] for own in scores.values()) / len(scores) for key in keys}}
