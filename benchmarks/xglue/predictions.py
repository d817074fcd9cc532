"""Official prediction files, {TASK}/{language}.prediction."""

from collections.abc import Sequence
from pathlib import Path

from .examples import Example
from .tasks import Task


def write(folder: str | Path, task: Task, language: str, predictions) -> Path:
    """Writes ``folder/{task.folder}/{language}.prediction`` and returns its path; predictions as features.decode's."""
    raise NotImplementedError


def read(folder: str | Path, task: Task, language: str, examples: Sequence[Example]):
    """The predictions of the file, as features.decode gives them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not as many predictions as examples, a label that the task does not have; names file and line.
    """
    raise NotImplementedError
