"""Scores of methods that are not the paper's, beside those of full fine-tuning and of a method of its study."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..scores import statistics
from .collect import Group, collect

FOLDER = "beyond"  # of the tables of methods that are not the paper's, which its report leaves out
FULL = "sft"
BESIDE_SAVING, BESIDE_UPDATES = "gradfreeze-topdown", "graddrop"  # what stands beside them in a table


@dataclass(frozen=True)
class Score:
    """A method's mean test scores over seeds in percent, with their intervals: of English, and of the mean over all
    other languages.
    """

    method: str
    lr: float
    english: statistics.Paired
    others: statistics.Paired


def scores(folder: Path, methods: Iterable[str], beside: str) -> tuple[Group, list[Score]]:
    """Returns the runs and their scores, in the order of a table: full fine-tuning, ``methods``, and ``beside``.

    Args:
        folder: has the paper's tables of results, and those of the other methods in ``beyond``.
        beside: a method of the paper.

    Raises:
        FileNotFoundError: a table is missing, or the runs of a method.
        ValueError: the other methods' runs have settings that no run of the paper's methods has.
    """
    (group,) = collect(folder / FOLDER)
    theirs = [other for other in collect(folder) if other.configuration == group.configuration]
    if not theirs:
        raise ValueError(f"{folder / FOLDER}: no run in {folder} has these settings: {group.configuration}")
    if missing := [name for name in methods if name not in group.runs]:
        raise FileNotFoundError(f"{folder / FOLDER}: no runs of {', '.join(missing)}")
    runs = {FULL: theirs[0].runs[FULL], **{name: group.runs[name] for name in methods}, beside: theirs[0].runs[beside]}
    found = []
    for method, own in runs.items():
        english, zero = (interval(list(own.scores(column).values())) for column in ("en", "zero"))
        found.append(Score(method, own.lr, english, zero))
    return replace(group, runs=runs), found


def gain(group: Group, method: str, other: str) -> statistics.Paired:
    """Returns the difference of two methods in the mean over all languages but English, paired by seed."""
    first, second = (group.runs[name].scores("zero") for name in (method, other))
    common = sorted(first.keys() & second.keys())
    return statistics.paired([first[seed] for seed in common], [second[seed] for seed in common])


def interval(values: Sequence[float]) -> statistics.Paired:
    """Returns the mean of a sample and its 95 % interval."""
    return statistics.paired(values, [0.0] * len(values))
