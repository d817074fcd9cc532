"""Methods beyond the paper beside full fine-tuning. Those that save memory: accuracy (benchmarks/xglue), peak memory
and time per step (benchmarks/cpu/training.py) in one table. Masks on the update and on other optimizers: accuracy.
"""

from pathlib import Path
from statistics import mean

from ..common.results import load
from .cpu_tables import caption
from .markdown import markdown, number

NONE = "\n*No results yet.*\n\n"
NAMES = {"sft": "full fine-tuning", "lora": "LoRA (PEFT), rank 8", "gradfreeze-topdown": "GradFreeze, top down"}
BESIDE = "graddrop"  # what masks on the update and on other optimizers are compared with besides


def _found(results: Path, methods: str, beside: str):
    """Returns (group, scores), or None if nothing was run. ``methods``, ``beside``: names in the study's modules."""
    from ..xglue import methods as studied  # imported here, as they load torch
    from ..xglue.report import beyond

    try:
        return beyond.scores(results / "xglue", getattr(studied, methods), getattr(beyond, beside))
    except FileNotFoundError:
        return None


def _saving(results: Path):
    """Returns (group, scores, JSON of the training runs or None), or None if nothing was run."""
    if not (own := _found(results, "SAVING", "BESIDE_SAVING")):
        return None
    trainings = [own["training"] for own in load(results).values() if "training" in own]
    return *own, trainings[0] if trainings else None


def _name(method: str) -> str:
    from ..xglue.titles import TITLES

    return NAMES.get(method, TITLES[method])


def _interval(test) -> str:
    return number(test.difference) + ("" if test.high is None else f" ± {number(test.high - test.difference)}")


def _gain(group, method: str, other: str) -> str:
    from ..xglue.report.beyond import gain

    if method == other:
        return "–"
    test = gain(group, method, other)
    return ("+" if test.difference > 0 else "") + _interval(test)


def _accuracy(group, score) -> list[str]:
    """Returns the cells of a method: its name to the scores at its other rate."""
    runs = group.runs[score.method]
    others = [runs.at(lr) for lr in runs.by_rate if lr != score.lr]
    beside = [f"{other.lr:g}: {number(mean(other.scores('zero').values()))}" for other in others]
    return [
        _name(score.method), str(score.others.n), f"{score.lr:g}", _interval(score.english), _interval(score.others),
        _gain(group, score.method, "sft"), ", ".join(beside) or "–",
    ]  # fmt: skip


def _header(group) -> list[str]:
    tuning = sorted({len(runs.tuning) for runs in group.runs.values()})
    seeds = f"{' to '.join(map(str, tuning))} seeds"
    return ["method", "seeds", "rate", "English, %", "other languages, %", "minus full", f"at the other rate, {seeds}"]


def _ran(group) -> str:
    from ..xglue.report.tables import ran_on

    return f"*Accuracy: {group.result['model'].split(' (')[0]}. {ran_on([group])}*"


def _costs(training: dict | None, method: str) -> tuple[str, str, str]:
    """Returns peak memory in MiB, over full fine-tuning's, and the time per step over its."""
    row = next((row for row in (training or {}).get("rows", ()) if row["method"] == method), None)
    if row is None or row["peak_bytes"] is None:
        return "–", "–", number(row and row["ratio"])
    return f"{row['peak_bytes'] / 2**20:.0f}", number(row["peak_ratio"]), number(row["ratio"])


def summary(results: Path) -> str:
    """Returns the front page's table."""
    if not (own := _saving(results)):
        return NONE
    group, found, training = own
    where = f"Memory and time: {caption(training) if training else 'not measured'}"
    rows = [
        [
            _name(score.method), str(score.others.n), _interval(score.english), _interval(score.others),
            *_costs(training, score.method)[1:],
        ] for score in found
    ]  # fmt: skip
    header = ["mean ± 95 %", "seeds", "English, %", f"{len(group.languages) - 1} others, %"]
    return f"\n*{where}*\n\n{markdown([*header, 'peak memory', 'time per step'], rows)}\n\n"


def section(results: Path) -> str:
    """Returns the whole table, with seeds, rates, differences and where all of it ran."""
    if not (own := _saving(results)):
        return NONE
    group, found, training = own
    again = _costs(training, "sft, again")
    rows = [[*_accuracy(group, score), *_costs(training, score.method)] for score in found]
    header = [*_header(group), "peak memory, MiB", "/ full", "time per step / full"]
    parts = [_ran(group), markdown(header, rows)]
    if training:
        parts[1:1] = [f"*Memory and time: {caption(training)}. Full fine-tuning once more in the same run: memory "
                      f"{again[1]}, time {again[2]}.*"]  # fmt: skip
    return "\n" + "\n\n".join(parts) + "\n\n"


def updates(results: Path) -> str:
    """Returns the table of masks on the update and on other optimizers."""
    if not (own := _found(results, "UPDATES", "BESIDE_UPDATES")):
        return NONE
    group, found = own
    rows = []
    for score in found:
        rows.append([*_accuracy(group, score), _gain(group, score.method, BESIDE)])
    return f"\n{_ran(group)}\n\n{markdown([*_header(group), 'minus GradDrop'], rows)}\n\n"


TABLES = {"saving": section, "saving-summary": summary, "updates": updates}
