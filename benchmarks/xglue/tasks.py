"""The tasks: XGLUE's nine of language understanding, and stand-ins, whose data may be redistributed and is in this
repository.

Languages, labels and metrics of the nine are those of the official evaluator (microsoft/XGLUE,
evaluation/xglue_evaluate.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSettings:
    """Hyper-parameters of a fine-tuning run on English. The GradDrop paper prints none of these, so each has a source.

    lr: peak learning rate of AdamW. batch_size: examples per step. epochs: passes over the training data. max_length:
    sub-words of an input, special ones included. stride: sub-words that two windows of a long passage share (0: no
    windows). source: who published them for this task.
    """

    lr: float
    batch_size: int
    epochs: int
    max_length: int
    stride: int
    source: str


@dataclass(frozen=True)
class Task:
    """A task without its data.

    kind: "sequence" (a label per text, or per title and body), "pair" (a label per two texts), "ranking" (the same, and
    the metric takes the examples of a query together), "token" (a label per word), "span" (an answer is a part of a
    text).
    labels: in the order of the classifier's outputs; empty for spans.
    languages: to test in, English first; training is on English.
    metric: the official score: "accuracy", "chunk_f1", "chunk_precision", "ndcg", "answer_f1".
    official: one of XGLUE's, whose data the user brings; else a stand-in in benchmarks/xglue/data.
    folder: of the official data and prediction files; a stand-in's own name.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    metric: str
    official: bool
    folder: str
    settings: TaskSettings


# Published for XLM-R-Large by FILTER (the paper's [20]); for tasks that FILTER did not train, by Unicoder (12 layers).
_FILTER, _UNICODER = "FILTER, xlm-roberta-large", "Unicoder, 12 layers"
_SHORT = TaskSettings(5e-6, 32, 10, 256, 0, _UNICODER)
# Ours, not tuned: for a small encoder and a few hundred to a few thousand examples.
_OURS = "ours, for multilingual-e5-small"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _entities(*types: str) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


_NC = _words("foodanddrink sports news entertainment health video finance travel lifestyle autos")
_SIB200 = _words("entertainment geography health politics science/technology sports travel")
_XQUAD = _words("en ar de el es hi ro ru th tr vi zh")
_XNLI = _words("en ar bg de el es fr hi ru sw th tr ur vi zh")
_MLQA = _words("en ar de es hi vi zh")
UPOS = _words("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X")
_POS = _words("en ar bg de el es fr hi it nl pl pt ru th tr ur vi zh")

_ALL = (
    # name, kind, labels, languages, metric, official, folder, settings
    Task(
        "xnli", "pair", ("contradiction", "entailment", "neutral"), _XNLI, "accuracy", True, "XNLI",
        TaskSettings(3e-6, 64, 5, 256, 0, _FILTER),
    ),
    Task(
        "pawsx", "pair", ("0", "1"), _words("en de es fr"), "accuracy", True, "PAWSX",
        TaskSettings(1e-5, 32, 4, 256, 0, _FILTER),
    ),
    Task("nc", "sequence", _NC, _words("en de es fr ru"), "accuracy", True, "NC", _SHORT),
    Task("qadsm", "pair", ("Bad", "Good"), _words("en de fr"), "accuracy", True, "QADSM", _SHORT),
    Task("wpr", "ranking", tuple("01234"), _words("en de es fr it pt zh"), "ndcg", True, "WPR", _SHORT),
    Task("qam", "pair", ("0", "1"), _words("en de fr"), "accuracy", True, "QAM", _SHORT),
    Task(
        "ner", "token", _entities("PER", "LOC", "ORG", "MISC"), _words("en de es nl"), "chunk_f1", True, "NER",
        TaskSettings(5e-6, 64, 20, 128, 0, _FILTER),
    ),
    Task("pos", "token", UPOS, _POS, "chunk_precision", True, "POS", TaskSettings(5e-6, 64, 20, 128, 0, _FILTER)),
    Task("mlqa", "span", (), _MLQA, "answer_f1", True, "MLQA", TaskSettings(5e-6, 64, 2, 384, 128, _FILTER)),
    Task(
        "sib200", "sequence", _SIB200,
        _words("en ar bg de el es fr hi id it ja ko nl pl pt ru sw th tr ur vi zh"),
        "accuracy", False, "sib200", TaskSettings(1e-4, 16, 5, 64, 0, _OURS),
    ),
    Task(
        "ud-pos", "token", UPOS, _words("en de es fr nl ru th vi zh"), "chunk_precision", False, "ud-pos",
        TaskSettings(2e-4, 32, 3, 128, 0, _OURS),
    ),
    Task(
        "uner", "token", _entities("PER", "LOC", "ORG"), _words("en de pt ru zh"), "chunk_f1", False, "uner",
        TaskSettings(2e-4, 32, 3, 128, 0, _OURS),
    ),
    Task(
        "nusax", "sequence", ("negative", "neutral", "positive"),
        _words("en id ace ban bbc bjn bug jv mad min nij su"),
        "accuracy", False, "nusax", TaskSettings(1e-4, 16, 5, 128, 0, _OURS),
    ),
    Task("xquad", "span", (), _XQUAD, "answer_f1", False, "xquad", TaskSettings(2e-4, 16, 5, 384, 128, _OURS)),
    Task(
        "xquad-match", "pair", ("0", "1"), _XQUAD, "accuracy", False, "xquad-match",
        TaskSettings(1e-4, 16, 5, 256, 0, _OURS),
    ),
    Task(
        "xquad-rank", "ranking", ("0", "1"), _XQUAD, "ndcg", False, "xquad-rank",
        TaskSettings(1e-4, 16, 5, 256, 0, _OURS),
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
SPLITS = ("train", "dev", "test")
# Languages without development data among the stand-ins are left out.
_DEV = {"ud-pos": ("en", "de", "es", "fr", "nl"), "uner": ("en",), "nusax": ("en",)}


def languages(task: Task, split: str) -> tuple[str, ...]:
    """Returns the languages of a split: English alone for "train", all for "test". ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if split == "train":
        return task.languages[:1]
    return _DEV.get(task.name, task.languages) if split == "dev" else task.languages


def check(task: Task, language: str, split: str) -> None:
    """Raises ValueError for a language or a split that the task does not have."""
    own = languages(task, split)
    if language not in own:
        raise ValueError(f"language {language!r}: the {split} split of {task.name} has {', '.join(own)}")
