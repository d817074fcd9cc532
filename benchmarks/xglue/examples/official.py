"""Reads examples from the official folder ``xglue_full_dataset``.

Files and columns follow microsoft/XGLUE's Data_Format.txt, its evaluator and Unicoder's readers. XNLI has two layouts:
{language}.dev and .test (premise, hypothesis, label), and xnli.dev.tsv and xnli.test.tsv for all languages.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ..tasks import TASKS, Task, check
from .kinds import Example, SpanExample, TextExample, WordsExample

# Columns of the first text and of the second; the columns of a text are joined by a space. The label is the last one.
_COLUMNS = {
    "xnli": (0, (1,)),
    "pawsx": (1, (2,)),
    "nc": (0, (1,)),
    "qadsm": (0, (1, 2)),
    "wpr": (0, (1, 2)),
    "qam": (0, (1,)),
}
_TRAIN = {"xnli": "multinli.train.en.tsv", "pawsx": "en/train.tsv", "mlqa": "squad1.1/train-v1.1.json"}


def load(task: Task, language: str, split: str, root: str | Path) -> list[Example]:
    """Returns the examples in the order of the file. Labels are checked. A guid is "{split}-{line}", or the id of a
    question.

    Raises:
        FileNotFoundError: the folder of the task or the file is missing.
        ValueError: a file that is empty, not UTF-8 or not JSON; a column missing; an unknown label: with file and line.
    """
    check(task, language, split)
    folder = Path(root) / task.folder
    if not folder.is_dir():
        own = ", ".join(task.folder for task in TASKS.values() if task.official)
        raise FileNotFoundError(f"{folder}: no such folder; root must be xglue_full_dataset, which has {own}")
    path = folder / file_name(task, language, split)
    other = folder / f"xnli.{split}.tsv"
    if task.name == "xnli" and split != "train" and not path.exists():
        if not other.exists():
            raise FileNotFoundError(f"{path}: no such file, and no {other.name} beside it; one of them is expected")
        return _filled(other, list(_all_languages(task, language, split, other)))
    if task.kind == "span":
        return spans(read(path), str(path))
    if task.kind == "token":
        return words(task, split, read(path), str(path))
    return _filled(path, list(_rows(task, split, path)))


def file_name(task: Task, language: str, split: str) -> str:
    """Returns the file of an official task, relative to its folder."""
    if split == "train" and task.name in _TRAIN:
        return _TRAIN[task.name]
    if task.name == "mlqa":
        return f"MLQA_V1/{split}/{split}-context-{language}-question-{language}.json"
    if task.name == "pawsx":
        return f"{language}/{split}_2k.tsv"
    return f"{language}.{split}" if task.name in ("xnli", "ner", "pos") else f"xglue.{task.name}.{language}.{split}"


def read(path: Path, encoding: str = "utf-8-sig") -> str:
    """Returns the text of a file, newlines as Python reads them, as the official evaluator counts lines so.

    ``encoding`` is "utf-8" to keep a byte order mark.

    Raises FileNotFoundError; ValueError for an empty file and for one that is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is expected there")
    try:
        text = path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def lines(text: str) -> list[str]:
    """Splits into lines without newlines. str.splitlines also cuts at U+2028 and the like, which texts contain."""
    return text.removesuffix("\n").split("\n")


def checked_label(task: Task, label: str, where: str) -> str:
    """Returns the label if the task has it; else raises ValueError."""
    if label not in task.labels:
        raise ValueError(f"{where}: label {label!r}: {task.name} has {', '.join(task.labels)}")
    return label


def words(task: Task, split: str, text: str, where: str) -> list[WordsExample]:
    """Reads sentences: "word label" lines with blank lines between them. where: the name of the text in errors."""
    examples, sentence, tags = [], [], []
    for number, line in enumerate([*lines(text), ""], 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            label = line.split()[-1]
            word = line[: line.rindex(label)]
            if not word:
                raise ValueError(f"{where}:{number}: {line!r}: a word, a space and a label are expected")
            sentence.append(word[:-1])
            tags.append(checked_label(task, label, f"{where}:{number}"))
        elif sentence:
            examples.append(WordsExample(f"{split}-{len(examples)}", sentence, tags))
            sentence, tags = [], []
    return _filled(where, examples)


def spans(text: str, where: str) -> list[SpanExample]:
    """Reads questions of a JSON text in SQuAD's form. where: the name of the text in errors."""
    try:
        articles = json.loads(text)["data"]
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}:{error.lineno}: not JSON: {error.msg}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f'{where}: SQuAD\'s form is expected, {{"data": [...]}}') from error
    examples = {}
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_field(article, "paragraphs", f"{where}: data[{a}]")):
            at = f"{where}: data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", at)
            for q, question in enumerate(_field(paragraph, "qas", at)):
                here = f"{at}.qas[{q}]"
                guid = str(_field(question, "id", here))
                answers = tuple(
                    (_field(answer, "text", here), _field(answer, "answer_start", here))
                    for answer in _field(question, "answers", here)
                )
                if not answers:
                    raise ValueError(f"{here}: question {guid!r} has no answer")
                for answer, start in answers:
                    if not (isinstance(start, int) and 0 <= start <= len(context) - len(answer)):
                        raise ValueError(f"{here}: answer_start {start!r} of question {guid!r} is not in its context")
                if guid in examples:
                    raise ValueError(f"{here}: id {guid!r} is there twice")
                examples[guid] = SpanExample(guid, _field(question, "question", here), context, answers)
    return _filled(where, list(examples.values()))


def _rows(task: Task, split: str, path: Path) -> Iterator[TextExample]:
    first, others = _COLUMNS[task.name]
    header = path.suffix == ".tsv"
    for number, line in enumerate(lines(read(path)), 1):
        if number == 1 and header or task.name == "pawsx" and not line.strip():
            continue  # the evaluator skips blank lines in PAWS-X only
        here = f"{path}:{number}"
        columns = line.split("\t")
        if len(columns) < others[-1] + 2:
            raise ValueError(
                f"{here}: {len(columns)} columns, {others[-1] + 2} are expected, the last one the label"
                " (early releases of XGLUE had no labels in the test files)"
            )
        label = columns[-1].strip()
        if task.name == "xnli" and split == "train" and label == "contradictory":
            label = "contradiction"
        group = columns[0] if task.kind == "ranking" else None
        pair = " ".join(columns[column] for column in others)
        yield TextExample(f"{split}-{number}", columns[first], pair, checked_label(task, label, here), group)


def _all_languages(task: Task, language: str, split: str, path: Path) -> Iterator[TextExample]:
    """Reads XNLI's own file: language, label, parses, and the sentences in columns 6 and 7."""
    for number, line in enumerate(lines(read(path))[1:], 2):
        columns = line.split("\t")
        if len(columns) < 8:
            raise ValueError(f"{path}:{number}: {len(columns)} columns, at least 8 are expected")
        if columns[0] == language:
            label = checked_label(task, columns[1], f"{path}:{number}")
            yield TextExample(f"{split}-{number}", columns[6], columns[7], label)


def _field(record: dict, name: str, where: str):
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where}: {name!r} is missing")
    return record[name]


def _filled(where: str | Path, examples: list) -> list:
    if not examples:
        raise ValueError(f"{where}: no example in it")
    return examples
