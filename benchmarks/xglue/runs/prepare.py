"""Prepares what all runs of a configuration share: the examples, cut into sub-words, and the pretrained encoder."""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

from ..examples.kinds import Example, SpanExample, TextExample, WordsExample
from ..examples.load import load
from ..models import encoders, features
from ..settings import Settings
from ..tasks import TASKS, Task


@dataclass(frozen=True)
class Split:
    """Examples, and their features (see ``features.encode``)."""

    examples: list[Example]
    features: list[dict]


@dataclass(frozen=True)
class Prepared:
    """Data and encoder of a configuration. train is English; dev and test are by language."""

    task: Task
    source: encoders.Source
    train: Split
    dev: dict[str, Split]
    test: dict[str, Split]


def prepare(settings: Settings, root: str | Path | None = None) -> Prepared:
    """Loads, trims and tokenises. The result for the same data, model and lengths is kept for the next run.

    Raises:
        FileNotFoundError, ValueError: what ``load`` and ``encoders.load`` raise.
    """
    languages = (settings.languages, settings.dev_languages)
    limits = (settings.train_examples, settings.eval_examples)
    cut = (settings.max_length, settings.stride, settings.prefix)
    return _prepare(settings.task, settings.model, *languages, *limits, *cut, None if root is None else str(root))


@functools.lru_cache(maxsize=2)
def _prepare(
    name, model, test_languages, dev_languages, train_limit, eval_limit, max_length, stride, prefix, root
) -> Prepared:
    task = TASKS[name]
    wanted = [("train", "en", train_limit)]
    wanted += [("dev", language, eval_limit) for language in dev_languages]
    wanted += [("test", language, eval_limit) for language in test_languages]
    examples = {(split, language): load(task, language, split, root)[:limit] for split, language, limit in wanted}
    shown = {key: [_with_prefix(example, prefix) for example in own] for key, own in examples.items()}
    texts = list(dict.fromkeys(text for own in shown.values() for example in own for text in texts_of(example)))
    source = encoders.load(model, task, texts)
    splits = {
        key: Split(own, features.encode(task, shown[key], source.tokenizer, max_length, stride))
        for key, own in examples.items()
    }
    dev, test = ({key[1]: own for key, own in splits.items() if key[0] == split} for split in ("dev", "test"))
    return Prepared(task, source, splits["train", "en"], dev, test)


def check(settings: Settings, root: str | Path | None = None) -> None:
    """Reads every file of the task and looks for the model, before anything is run.

    Raises:
        FileNotFoundError, OSError, ValueError, ModuleNotFoundError: a file or the model is missing or cannot be read.
    """
    task = TASKS[settings.task]
    if task.official and root is None:
        ours = ", ".join(task.name for task in TASKS.values() if not task.official)
        raise ValueError(
            f"--data: {task.name} is a task of XGLUE, whose data you must have: give its folder "
            f"xglue_full_dataset. Tasks that need none: {ours}"
        )
    for split, languages in (("train", ("en",)), ("dev", settings.dev_languages), ("test", settings.languages)):
        for language in languages:
            load(task, language, split, root)
    encoders.check(settings.model)


def texts_of(example: Example) -> list[str]:
    """Returns the strings of an example that a tokenizer cuts, each by itself."""
    if isinstance(example, WordsExample):
        return example.words
    if isinstance(example, SpanExample):
        return [example.question, example.context]
    return [example.text] if example.pair is None else [example.text, example.pair]


def _with_prefix(example: Example, prefix: str) -> Example:
    if not prefix:
        return example
    if isinstance(example, WordsExample):
        return example  # a sub-word label needs a word
    if isinstance(example, TextExample):
        return dataclasses.replace(example, text=prefix + example.text)
    return dataclasses.replace(example, question=prefix + example.question)


def sizes(prepared: Prepared) -> dict[str, int]:
    """Returns {"train": examples, "dev en": ..., "test de": ...}."""
    parts = itertools.chain(
        [("train", prepared.train)],
        ((f"dev {language}", split) for language, split in prepared.dev.items()),
        ((f"test {language}", split) for language, split in prepared.test.items()),
    )
    return {name: len(split.examples) for name, split in parts}
