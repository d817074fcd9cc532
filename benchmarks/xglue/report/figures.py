"""Draws the paper's figures 2 to 4 from our results."""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which keeps global state and may open a window

from graddrop_kernels.demo.report import COLOURS, MARKERS, STYLES

from ..scores import statistics
from ..titles import TITLES
from .collect import Group


def mean_by_epoch(group: Group, method: str) -> dict[int, list[float]]:
    """Returns {epoch: test score in percent, mean over languages, of each seed}, for runs that tested every epoch."""
    found: dict[int, list[float]] = {}
    for result in group.runs[method].results.values():
        if len(result["test"]) > 1:
            for epoch, scores in result["test"].items():
                mean = statistics.mean([100 * score["official"] for score in scores.values()])
                found.setdefault(int(epoch), []).append(mean)
    return found


def by_epoch(path: Path, group: Group) -> None:
    """Draws figure 2: a line per method with its band."""
    sheet, axes = _sheet(8, 5.5)
    for number, method in enumerate(group.runs):
        points = mean_by_epoch(group, method)
        epochs = sorted(points)
        if not epochs:
            continue
        means = np.array([statistics.mean(points[epoch]) for epoch in epochs])
        spread = np.array([statistics.sd(points[epoch]) or 0 for epoch in epochs])
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(epochs, means, STYLES[number // len(COLOURS)], label=TITLES[method], markersize=5, **style)
        axes.fill_between(epochs, means - spread, means + spread, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test score, %, mean over languages")
    _title(sheet, [group])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="0.9")
    sheet.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    sheet.savefig(path)


def gains(path: Path, group: Group) -> None:
    """Draws figure 4: each method's mean gain over SFT by language, in points."""
    methods = [method for method in group.runs if method != "sft"]
    columns = [*group.languages, "avg"]
    values = np.full((len(methods), len(columns)), np.nan)
    for i, method in enumerate(methods):
        for k, column in enumerate(columns):
            base, own = group.runs["sft"].scores(column), group.runs[method].scores(column)
            seeds = base.keys() & own.keys()
            if seeds:
                values[i, k] = statistics.mean([own[seed] - base[seed] for seed in sorted(seeds)])
    labels = [f"{language}\n(trained)" if language == "en" else language for language in group.languages]
    sheet, axes = _sheet(2.6 + 0.62 * len(columns), 1.6 + 0.42 * len(methods))
    text = [["" if math.isnan(value) else f"{value:+.1f}" for value in row] for row in values]
    _heat(sheet, axes, values, text, [TITLES[method] for method in methods], [*labels, "Avg."], "gain over SFT, points")
    _title(sheet, [group])
    sheet.savefig(path)


def t_matrix(path: Path, groups: list[Group], methods: list[str], tests: list, adjusted: list[float]) -> None:
    """Draws figure 3: t of row minus column over the groups; a star where the corrected p is at most 0.05."""
    place = {method: i for i, method in enumerate(methods)}
    values = np.full((len(methods), len(methods)), np.nan)
    text = [[""] * len(methods) for _ in methods]
    for (first, second, test), p in zip(tests, adjusted):
        for a, b, t in ((first, second, test.t), (second, first, -test.t)):
            i, k = place[a], place[b]
            values[i, k] = max(-99.0, min(99.0, t))
            text[i][k] = f"{t:.1f}" + ("*" if p <= 0.05 else "")
    names = [TITLES[method] for method in methods]
    sheet, axes = _sheet(3.4 + 0.72 * len(methods), 2.4 + 0.46 * len(methods))
    _heat(sheet, axes, values, text, names, names, "t, row minus column")
    axes.tick_params(axis="x", rotation=40)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    _title(sheet, groups)
    sheet.savefig(path)


def _heat(sheet, axes, values, text, rows, columns, name) -> None:
    limit = float(np.nanmax(np.abs(values))) if not np.all(np.isnan(values)) else 1.0
    image = axes.imshow(values, cmap="PuOr", vmin=-max(limit, 1e-9), vmax=max(limit, 1e-9), aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    for i, line in enumerate(text):
        for k, cell in enumerate(line):
            dark = abs(values[i][k]) > 0.7 * limit
            axes.text(k, i, cell, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.spines[:].set_visible(False)
    sheet.colorbar(image, ax=axes, label=name, fraction=0.03, pad=0.02)


def _sheet(width: float, height: float):
    sheet = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = sheet.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return sheet, axes


def _title(sheet: Figure, groups: list[Group]) -> None:
    """Returns data sets, seeds and the model of all groups, in lines as long as the figure is wide."""
    data = ", ".join(f"{group.data_name} ({_seeds(group)})" for group in groups)
    width = int(13 * sheet.get_figwidth())  # at 10 points, about 14 characters per inch
    lines = [line for text in (data, groups[0].result["model"]) for line in textwrap.wrap(text, width)]
    sheet.suptitle("\n".join(lines), fontsize=10)


def _seeds(group: Group) -> str:
    counts = sorted({len(runs.results) for runs in group.runs.values()})
    return f"{counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") + " seed" + "s" * (counts[-1] > 1)
