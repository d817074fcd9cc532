"""Scores of the methods that save memory, beside those of full fine-tuning and of GradFreeze in the paper's study."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..methods import BEYOND
from ..scores import statistics
from .collect import Group, collect

FOLDER = "beyond"  # of the tables of methods that are not the paper's, which its report leaves out
FULL, BESIDE = "sft", "gradfreeze-topdown"


@dataclass(frozen=True)
class Score:
    """A method's mean test scores over seeds in percent, with their intervals: of English, of the mean over all other
    languages, and of the latter's difference to full fine-tuning, paired by seed (None for itself).
    """

    method: str
    lr: float
    english: statistics.Paired
    others: statistics.Paired
    gain: statistics.Paired | None


def scores(folder: Path) -> tuple[Group, list[Score]]:
    """Returns the runs and their scores, in the order of a table.

    Args:
        folder: has the paper's tables of results, and those of the other methods in ``beyond``.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: the other methods' runs have settings that no run of the paper's methods has.
    """
    (group,) = collect(folder / FOLDER)
    theirs = [other for other in collect(folder) if other.configuration == group.configuration]
    if not theirs:
        raise ValueError(f"{folder / FOLDER}: no run in {folder} has these settings: {group.configuration}")
    runs = {FULL: theirs[0].runs[FULL], **{name: group.runs[name] for name in BEYOND}, BESIDE: theirs[0].runs[BESIDE]}
    full = runs[FULL].scores("zero")
    found = []
    for method, own in runs.items():
        others = own.scores("zero")
        common = sorted(others.keys() & full.keys())
        gain = statistics.paired([others[seed] for seed in common], [full[seed] for seed in common])
        english, zero = (interval(list(own.scores(column).values())) for column in ("en", "zero"))
        found.append(Score(method, own.lr, english, zero, None if method == FULL else gain))
    return replace(group, runs=runs), found


def interval(values: Sequence[float]) -> statistics.Paired:
    """Returns the mean of a sample and its 95 % interval."""
    return statistics.paired(values, [0.0] * len(values))
