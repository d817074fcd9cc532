"""Examples of the official tasks from Hugging Face ``datasets``, whose XGLUE has other names of fields and labels.

Not run against the hub, which could not be reached: field names, labels and splits are those of the loader's source.
Questions of MLQA have no id there, so their guids are numbers: the official evaluator cannot read such predictions.
The hub's POS may lack Portuguese.
"""

from ..tasks import Task, check
from .kinds import Example, SpanExample, TextExample, WordsExample
from .official import checked_label

NAME = "microsoft/xglue"

# The misspelt keys are the loader's.
_TEXT = {
    "xnli": ("premise", ("hypothesis",), "label"),
    "pawsx": ("sentence1", ("sentence2",), "label"),
    "nc": ("news_title", ("news_body",), "news_category"),
    "qadsm": ("query", ("ad_title", "ad_description"), "relevance_label"),
    "wpr": ("query", ("wed_page_title", "web_page_snippet"), "relavance_label"),
    "qam": ("question", ("annswer",), "label"),
}
_LABELS = {
    "pawsx": {"different": "0", "same": "1"},
    "qam": {"False": "0", "True": "1"},
    "wpr": {"Bad": "0", "Fair": "1", "Good": "2", "Excellent": "3", "Perfect": "4"},
}


def load(task: Task, language: str, split: str, name: str = NAME) -> list[Example]:
    """Examples from ``datasets.load_dataset(name, config)``; raises ValueError as official.load, and what that raises.

    Args:
        name: a dataset of the hub, or a folder, with the loader's configs and splits ("validation.de").
    """
    import datasets

    check(task, language, split)
    config = "paws-x" if task.name == "pawsx" else task.name
    theirs = "train" if split == "train" else f"{'validation' if split == 'dev' else split}.{language}"
    return examples(task, split, datasets.load_dataset(name, config, split=theirs))


def examples(task: Task, split: str, dataset) -> list[Example]:
    """Examples out of a ``datasets.Dataset`` with the loader's fields."""
    wanted = (
        ("question", "context", "answers")
        if task.kind == "span"
        else ("words", task.name)
        if task.kind == "token"
        else (_TEXT[task.name][0], *_TEXT[task.name][1], _TEXT[task.name][2])
    )
    if missing := [field for field in wanted if field not in dataset.features]:
        raise ValueError(f"the hub's {task.name} has no field {missing[0]!r}, it has {', '.join(dataset.features)}")
    if not len(dataset):
        raise ValueError(f"the hub's {task.name} {split} is empty")
    make = {"span": _span, "token": _words}.get(task.kind, _text)
    return [make(task, f"{split}-{number}", row, dataset.features) for number, row in enumerate(dataset)]


def _label(task: Task, value: int | str, feature, guid: str) -> str:
    """Ints are indices of the feature's names, if it is a ClassLabel."""
    text = feature.names[value] if isinstance(value, int) and hasattr(feature, "names") else str(value)
    return checked_label(task, _LABELS.get(task.name, {}).get(text, text), f"the hub's {task.name}, {guid}")


def _text(task: Task, guid: str, row: dict, features) -> TextExample:
    first, others, label = _TEXT[task.name]
    group = row[first] if task.kind == "ranking" else None
    pair = " ".join(row[key] for key in others)
    return TextExample(guid, row[first], pair, _label(task, row[label], features[label], guid), group)


def _words(task: Task, guid: str, row: dict, features) -> WordsExample:
    feature = getattr(features[task.name], "feature", None)
    return WordsExample(guid, list(row["words"]), [_label(task, tag, feature, guid) for tag in row[task.name]])


def _span(task: Task, guid: str, row: dict, features) -> SpanExample:
    answers = tuple(zip(row["answers"]["text"], row["answers"]["answer_start"]))
    return SpanExample(guid, row["question"], row["context"], answers)
