"""Reports of a run: a table by language, a figure, a JSON file."""

import json
import os
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which keeps global state and may open a window

# Okabe and Ito's colours, distinct under every common colour blindness. Markers and styles make eleven methods of them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
STYLES = ("-", "--", "-.", ":")
SMOOTHING = 10  # steps averaged in the curve of the loss


def zero_shot_mean(accuracy: dict[str, float]) -> float | None:
    """Returns the mean accuracy of the languages that were not trained on; None if there is none."""
    others = [value for language, value in accuracy.items() if language != "en"]
    return sum(others) / len(others) if others else None


def table(runs: list[dict]) -> str:
    """Returns accuracies in %: a row per method, a column per language, the mean of all but English, then the seconds
    of training.
    """
    width = max(len(name) for name in ("method", *(run["method"] for run in runs)))
    languages = "".join(f"{language:>6}" for language in runs[0]["accuracy"])
    lines = [f"{'method':{width}}{languages}  zero-shot  train s"]
    for run in runs:
        values = "".join(f"{value:6.1f}" for value in run["accuracy"].values())
        mean = zero_shot_mean(run["accuracy"])
        shown = "-" if mean is None else f"{mean:.1f}"
        lines.append(f"{run['method']:{width}}{values}  {shown:>9}  {run['seconds']['train']:7.0f}")
    return "\n".join(lines)


def write_json(path: Path, report: dict) -> None:
    """Writes ``report`` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def smooth(values: list[float]) -> list[float]:
    """Returns the mean of the last SMOOTHING values (fewer at the beginning)."""
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def figure(path: Path, runs: list[dict], title: str) -> None:
    """Writes a PNG: accuracy by language; beside it, by step, the share of the blocks' elements kept, and the loss."""
    many = len(runs) > 1
    sheet = Figure(figsize=(13, 6.4 if many else 5.4), dpi=130, layout="constrained")
    sheet.suptitle(title, fontsize=11)
    grid = sheet.add_gridspec(2, 2, width_ratios=(1.25, 1))
    languages, active, loss = (sheet.add_subplot(grid[place]) for place in ((slice(None), 0), (0, 1), (1, 1)))
    columns = _columns(runs[0])
    handles = []
    for i, run in enumerate(runs):
        colour, line = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS)]
        values = list(_columns(run).values())
        places = [k + 0.7 * ((i + 0.5) / len(runs) - 0.5) for k in range(len(values))]
        marker = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 7}
        languages.plot(places, values, linestyle="none", **marker)
        handles += languages.plot([], [], line, label=run["method"], **marker)  # draws nothing; for the legend only
        if not many:
            for place, value in zip(places, values, strict=True):
                above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                languages.annotate(f"{value:.1f}", (place, value), **above)
        steps = range(1, len(run["losses"]) + 1)
        # Block masks jump from step to step. One such curve is worth seeing, but eleven would hide each other.
        shares = smooth(run["active_fraction"]) if many else run["active_fraction"]
        active.step(steps, shares, line, where="mid", color=colour, linewidth=1.5)
        loss.plot(steps, smooth(run["losses"]), line, color=colour, linewidth=1.5)

    lowest = min(value for run in runs for value in run["accuracy"].values())
    languages.set(
        xticks=range(len(columns)),
        xticklabels=columns,
        xlim=(-0.6, len(columns) - 0.4),
        ylim=(max(0, 5 * (lowest // 5) - 5), 100),
        ylabel="accuracy on 204 sentences, %",
        title="accuracy by language",
    )
    for k in range(len(columns) - 1):
        languages.axvline(k + 0.5, color="0.9", linewidth=0.8)
    averaged = f", mean of {SMOOTHING} steps" if many else ", by step"
    active.set(ylim=(-0.03, 1.05), ylabel="share", title=f"elements of the blocks kept{averaged}", xticklabels=[])
    loss.set(xlabel="step", ylabel="loss", title=f"training loss, mean of {SMOOTHING} steps", ylim=(0, None))
    for axes in (languages, active, loss):
        axes.title.set_fontsize(10)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if many:
        sheet.legend(handles=handles, loc="outside lower center", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    sheet.savefig(path)


def _columns(run: dict) -> dict[str, float]:
    """Returns accuracies by the label below them: the languages, then the zero-shot mean if there is one."""
    columns = {"en\n(trained)" if name == "en" else name: value for name, value in run["accuracy"].items()}
    mean = zero_shot_mean(run["accuracy"])
    return columns if mean is None else columns | {"zero-shot\nmean": mean}
