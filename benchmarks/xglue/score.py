"""Scores a folder of official prediction files."""

from collections.abc import Sequence
from pathlib import Path


def score_folder(
    folder: str | Path, tasks: Sequence[str] | None = None, split: str = "test", root: str | Path | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {language: metrics.score(...), "avg": {"official": mean over the languages, ...}}}.

    Args:
        folder: has {TASK}/{language}.prediction.
        tasks: names out of tasks.TASKS; default: those that have a folder.
        split: "dev" or "test".
        root: as data.load's.

    Raises:
        FileNotFoundError, ValueError: as predictions.read and data.load, and when no task has a folder.
    """
    raise NotImplementedError
