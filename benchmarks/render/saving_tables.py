"""Methods that save memory, beside full fine-tuning: accuracy (benchmarks/xglue), peak memory and time per step
(benchmarks/cpu/training.py) in one table.
"""

from pathlib import Path
from statistics import mean

from ..common.results import load
from .cpu_tables import caption
from .markdown import markdown, number

NONE = "\n*No results yet.*\n\n"
NAMES = {"sft": "full fine-tuning", "lora": "LoRA (PEFT), rank 8", "gradfreeze-topdown": "GradFreeze, top down"}


def _found(results: Path):
    """Returns (group, scores, JSON of the training runs or None), or None if nothing was run."""
    from ..xglue.report.saving import scores  # imported here, as it loads torch

    try:
        group, found = scores(results / "xglue")
    except FileNotFoundError:
        return None
    trainings = [own["training"] for own in load(results).values() if "training" in own]
    return group, found, trainings[0] if trainings else None


def _name(method: str) -> str:
    from ..xglue.titles import TITLES

    return NAMES.get(method, TITLES[method])


def _interval(test) -> str:
    return number(test.difference) + ("" if test.high is None else f" ± {number(test.high - test.difference)}")


def _costs(training: dict | None, method: str) -> tuple[str, str, str]:
    """Returns peak memory in MiB, over full fine-tuning's, and the time per step over its."""
    row = next((row for row in (training or {}).get("rows", ()) if row["method"] == method), None)
    if row is None or row["peak_bytes"] is None:
        return "–", "–", number(row and row["ratio"])
    return f"{row['peak_bytes'] / 2**20:.0f}", number(row["peak_ratio"]), number(row["ratio"])


def summary(results: Path) -> str:
    """Returns the front page's table."""
    if not (own := _found(results)):
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
    if not (own := _found(results)):
        return NONE
    from ..xglue.report.tables import ran_on

    group, found, training = own
    again = _costs(training, "sft, again")
    rows = []
    for score in found:
        runs = group.runs[score.method]
        others = [runs.at(lr) for lr in runs.by_rate if lr != score.lr]
        beside = [f"{other.lr:g}: {number(mean(other.scores('zero').values()))}" for other in others]
        gain = "–" if score.gain is None else ("+" if score.gain.difference > 0 else "") + _interval(score.gain)
        rows.append([
            _name(score.method), str(score.others.n), f"{score.lr:g}", _interval(score.english),
            _interval(score.others), gain, ", ".join(beside) or "–", *_costs(training, score.method),
        ])  # fmt: skip
    tuning = sorted({len(runs.tuning) for runs in group.runs.values()})
    header = ["method", "seeds", "rate", "English, %", "other languages, %", "minus full"]
    header += [f"at the other rate, {' to '.join(map(str, tuning))} seeds", "peak memory, MiB", "/ full"]
    header += ["time per step / full"]
    parts = [f"*Accuracy: {group.result['model'].split(' (')[0]}. {ran_on([group])}*", markdown(header, rows)]
    if training:
        parts[1:1] = [f"*Memory and time: {caption(training)}. Full fine-tuning once more in the same run: memory "
                      f"{again[1]}, time {again[2]}.*"]  # fmt: skip
    return "\n" + "\n\n".join(parts) + "\n\n"


TABLES = {"saving": section, "saving-summary": summary}
