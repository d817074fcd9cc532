"""Reads and writes official prediction files, {TASK}/{language}.prediction.

The n-th line is the label of the n-th example. For words there is a tag per line, with a blank line after each
sentence; for spans one JSON object, id -> answer.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..examples.kinds import Example
from ..examples.official import lines
from ..examples.official import read as read_text
from ..tasks import Task

_BOM = "\ufeff"  # a byte order mark, which the evaluator leaves in the text


def path(folder: str | Path, task: Task, language: str) -> Path:
    """Returns the path of the file."""
    return Path(folder) / task.folder / f"{language}.prediction"


def write(folder: str | Path, task: Task, language: str, predicted) -> Path:
    """Writes the file whole or not at all, and returns its path. ``predicted`` is as features.decode returns it."""
    target = path(folder, task, language)
    if task.kind == "span":
        text = json.dumps(predicted, ensure_ascii=False, indent=0) + "\n"
    elif task.kind == "token":
        # The evaluator would not see an empty sentence, which shifts all that follow. "O" is what it fills up with.
        text = "".join("".join(f"{tag}\n" for tag in tags or ["O"]) + "\n" for tags in predicted)
    else:
        text = "".join(f"{label}\n" for label in predicted)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def read(folder: str | Path, task: Task, language: str, examples: Sequence[Example]):
    """Returns the predictions of a file, as features.decode does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not exactly one prediction per example, or a label that the task does not have; names file and line.
            Fewer tags than words are a sentence that was cut; more are refused.

    Warns of questions without an answer, which count 0, and of a byte order mark, which stays a part of its label. Both
    are so in the evaluator.
    """
    source = path(folder, task, language)
    text = read_text(source, encoding="utf-8")
    if task.kind == "span":
        return _answers(source, text, examples)
    if task.kind == "token":
        return _sentences(source, text, task, examples)
    labels = [line.strip() for line in lines(text)]
    for number, label in enumerate(labels, 1):
        _check(task, label, f"{source}:{number}")
    _check_count(source, len(labels), len(examples), "labels")
    return labels


def _sentences(source: Path, text: str, task: Task, examples: Sequence[Example]) -> list[list[str]]:
    sentences, tags = [], []
    for number, line in enumerate([*lines(text), ""], 1):
        if tag := line.strip():
            tags.append(_check(task, tag, f"{source}:{number}", "O"))
            continue
        if not tags and number <= len(lines(text)):
            raise ValueError(f"{source}:{number}: a second blank line; the evaluator would read it as a tag")
        if tags:
            if len(sentences) < len(examples) and len(tags) > (length := len(examples[len(sentences)].words)):
                raise ValueError(f"{source}:{number}: {len(tags)} tags end here, of a sentence of {length} words")
            sentences.append(tags)
        tags = []
    _check_count(source, len(sentences), len(examples), "sentences")
    return sentences


def _answers(source: Path, text: str, examples: Sequence[Example]) -> dict[str, str]:
    try:
        answers = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}:{error.lineno}: not JSON, or cut off: {error.msg}") from error
    if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
        raise ValueError(f"{source}: one JSON object of ids and texts is expected")
    if missing := [example.guid for example in examples if example.guid not in answers]:
        warnings.warn(
            f"{source}: {len(missing)} of {len(examples)} questions have no answer, as {missing[0]!r}; they count 0",
            stacklevel=3,
        )
    return answers


def _check(task: Task, label: str, where: str, *others: str) -> str:
    known = (*task.labels, *others)
    if task.kind != "ranking" and label.startswith(_BOM) and label[1:] in known:  # of a ranking, it must be a number
        warnings.warn(
            f"{where}: a byte order mark before {label[1:]!r}, which makes another label of it, as in the evaluator",
            stacklevel=2,
        )
    elif label not in known:
        raise ValueError(f"{where}: label {label!r}: {task.name} has {', '.join(task.labels)}")
    return label


def _check_count(source: Path, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(f"{source}: {found} {what} for {wanted} examples; one for each is expected, in their order")
