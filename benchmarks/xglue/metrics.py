"""The official evaluator's numbers, and plain ones beside."""

from collections.abc import Sequence

from .examples import Example
from .tasks import Task


def score(task: Task, language: str, examples: Sequence[Example], predictions) -> dict[str, float]:
    """{"official": the evaluator's number, 0..1, and beside it "accuracy", "f1", "exact_match"... as fit the kind}."""
    raise NotImplementedError
