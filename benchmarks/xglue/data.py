"""The examples of a task, from wherever they are."""

from pathlib import Path

from .examples import Example
from .tasks import Task


def load(task: Task, language: str, split: str, root: str | Path | None = None) -> list[Example]:
    """Examples in the order of the file.

    Args:
        task: one of tasks.TASKS.
        language: one of task.languages; "train" has English only.
        split: "train", "dev" or "test".
        root: for official tasks the folder ``xglue_full_dataset``, or "hub" for Hugging Face ``datasets``.
            Stand-ins need none.

    Raises:
        ValueError: an unknown language or split; an official task without a root; what the loaders raise.
        FileNotFoundError: a file is missing; says where it is expected.
    """
    raise NotImplementedError
