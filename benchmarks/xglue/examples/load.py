"""Loads the examples of any task."""

from pathlib import Path

from ..tasks import TASKS, Task
from . import official, standins
from .kinds import Example


def load(task: Task, language: str, split: str, root: str | Path | None = None) -> list[Example]:
    """Returns the examples in the order of the file.

    Args:
        task: one of tasks.TASKS.
        language: one of task.languages; "train" has English only.
        split: "train", "dev" or "test".
        root: for official tasks the folder ``xglue_full_dataset``. Stand-ins need none.

    Raises:
        ValueError: an unknown language or split; an official task without a root; what the loaders raise.
        FileNotFoundError: a file is missing; says where it is expected.
    """
    if not task.official:
        return standins.load(task, language, split)
    if root is None:
        raise ValueError(
            f"root: {task.name} is a task of XGLUE, whose data you must have: give the folder "
            f"xglue_full_dataset; tasks that need none: {', '.join(t.name for t in TASKS.values() if not t.official)}"
        )
    return official.load(task, language, split, root)
