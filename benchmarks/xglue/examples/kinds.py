"""Example classes, one per kind of task: made by the loaders, used by features, metrics and predictions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextExample:
    """A text, or two, with one of the task's labels. group: the query, in ranking tasks."""

    guid: str
    text: str
    pair: str | None
    label: str
    group: str | None = None


@dataclass(frozen=True)
class WordsExample:
    """A sentence as words, with a tag per word."""

    guid: str
    words: list[str]
    tags: list[str]


@dataclass(frozen=True)
class SpanExample:
    """A question, and its answers in a context: (text, index of its first character). Metrics take the best answer."""

    guid: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


Example = TextExample | WordsExample | SpanExample
