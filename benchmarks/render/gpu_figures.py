"""Draws figures from the GPU's results."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from .goals import label, measured
from .gpu_tables import STEPS
from .style import COLORS, MARKERS, PLAIN, TARGET, save, title

LANES = 32  # per warp
SCHEDULERS = 4  # per multiprocessor, each issuing one instruction per warp and clock


def style_of(names) -> dict[str, dict]:
    """Returns a colour and a marker per name: torch is the target."""
    styles, number = {}, 0
    for name in dict.fromkeys(names):
        if name == "torch fused":
            styles[name] = {"color": TARGET, "marker": "s", "linewidth": 2.4}
        else:
            mark = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            styles[name] = mark | {"linewidth": 1.4, "linestyle": "-" if number < len(COLORS) else ":"}
            number += 1
    return styles


def step_ratios(result: dict, path: Path) -> Path:
    """Draws a panel per mode: time over torch fused, a row per variant, a marker per backend; quartiles as bars."""
    configs = result["configs"]
    kinds = ("ours", "peer", "check")
    rows = [row for kind in kinds for config in configs for row in measured(config["rows"], kind=kind)]
    names = list(dict.fromkeys(row["name"] for row in rows))
    styles = style_of(["torch fused", *sorted({row["backend"] for row in rows if row["backend"]})])
    size = (3.4 + 4.2 * len(configs), 1.8 + 0.33 * len(names))
    figure, axes = plt.subplots(1, len(configs), figsize=size, sharex=True, sharey=True, squeeze=False)
    shown = {}
    for axis, config in zip(axes.flat, configs):
        axis.axvline(1, color=TARGET, linewidth=1.6, zorder=1)
        for row in measured(config["rows"]):
            place, style = -names.index(row["name"]), styles[row["backend"] or "torch fused"]
            axis.plot([row["ratio_q1"], row["ratio_q3"]], [place, place], color=style["color"], linewidth=2, alpha=0.5)
            mark = {"color": style["color"], "marker": style["marker"], "linestyle": "none", "markersize": 7}
            shown[row["backend"] or "other libraries"] = axis.plot(row["ratio"], place, **mark)[0]
        axis.set_title(config["mode"])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(PLAIN)
        axis.grid(axis="x")
    axes[0, 0].set_yticks([-place for place in range(len(names))], names)
    figure.supxlabel("time of a step / time of torch's unmasked fused AdamW (line: 1.0); bars: quartiles")
    first = configs[0]
    text = f"Optimizer step, {first['work']}, {first['numel'] / 1e6:.4g}M parameters in {first['tensors']} tensors"
    figure.suptitle(title(text, result))
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return save(figure, path)


def roofline(result: dict, contract: list[dict], path: Path) -> Path:
    """Draws parameters per second against bytes per parameter. The bounds are the copy's bandwidth and, where the
    compile contract counts instructions, what the multiprocessors can issue over instructions per parameter.
    """
    figure, axis = plt.subplots(figsize=(7.6, 5.4))
    configs, gpu = result["configs"], result["machine"]["gpu"]
    widths = [8, 40]
    fastest = max(config["copy"]["gb_per_s"] for config in configs)
    axis.plot(widths, [fastest / width for width in widths], color=TARGET, linewidth=1.8, label="copy bandwidth")
    wanted = ("torch fused", "mask=None", "GradDrop", "GaussianGradDrop")
    rows = [(config, row) for config in configs for row in measured(config["rows"]) if row["name"] in wanted]
    styles = style_of(label(row) for _, row in rows)
    aside = {name: 1 + 0.012 * (number - len(styles) / 2) for number, name in enumerate(styles)}  # keeps points apart
    for name, style in styles.items():
        own = [row for _, row in rows if label(row) == name]
        moved, speeds = [row["bytes_per_param"] for row in own], [row["gb_per_s"] for row in own]
        mark = {"marker": style["marker"], "color": style["color"], "linestyle": "none", "markersize": 8}
        places = [aside[name] * width for width in moved]
        axis.plot(places, [speed / width for speed, width in zip(speeds, moved)], label=name, **mark)
    if gpu and gpu["sm_mhz_max"]:
        # Thread-instructions per second, in 1e9.
        issued = gpu["multiprocessors"] * SCHEDULERS * LANES * gpu["sm_mhz_max"] / 1e3
        bytes_of = {config["mode"]: config["bytes_per_param"] for config in configs}
        counted = [entry for entry in contract if entry["case"] in wanted and entry["mode"] in bytes_of]
        for number, entry in enumerate(counted):
            place, bound = bytes_of[entry["mode"]], issued / entry["instructions_per_element"]
            color = styles.get(label({"name": entry["case"], "backend": entry["backend"]}), {}).get("color", "#4D4D4D")
            text = "bound by instructions\n(static, in the point's colour)" if number == 0 else None
            axis.plot([place * 0.94, place * 1.06], [bound, bound], color=color, linewidth=2.2, label=text)
    axis.set(xscale="log", yscale="log", xlabel="bytes per parameter that a step has to move")
    axis.set_ylabel("parameters per second, 1e9")
    axis.set_xticks([14, 22, 28], ["14", "22", "28"])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_minor_formatter(PLAIN)
    axis.grid(which="both")
    figure.legend(fontsize=9, loc="outside right center")
    axis.set_title(title(f"Roofline, {configs[0]['work']}", result))
    return save(figure, path)


def sweep(result: dict, rows: list[dict], key: str, x_label: str, text: str, path: Path) -> Path:
    """Draws the time of a step, both axes logarithmic; a panel per mode (for tensors, per mode and total)."""
    panels = list(dict.fromkeys((row["mode"], row.get("total")) for row in rows))
    size = (1.5 + 4.6 * len(panels), 4.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    styles = style_of(label(row) for row in rows)
    for axis, (mode, total) in zip(axes.flat, panels):
        for name, style in styles.items():
            own = [row for row in rows if (row["mode"], row.get("total"), label(row)) == (mode, total, name)]
            axis.plot([row[key] for row in own], [row["seconds"] * 1e6 for row in own], label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel=x_label)
        axis.set_title(mode if total is None else f"{mode}, {total / 1e6:g}M elements")
        axis.grid()
    axes[0, 0].set_ylabel("time of a step, us")
    figure.suptitle(title(text, result))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(figure, path)


def frozen(result: dict, path: Path) -> Path:
    """Draws time against the share of the blocks that is trained."""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    axis.plot([0, 1], [0, 1], color=TARGET, linewidth=1.6, label="in proportion")
    rows = measured(result["frozen"])
    styles = style_of(f"{row['backend']}, {row['mode']}" for row in rows)
    for name, style in styles.items():
        own = [row for row in rows if f"{row['backend']}, {row['mode']}" == name]
        mark = {"marker": style["marker"], "color": style["color"], "linestyle": "none", "alpha": 0.8, "markersize": 8}
        axis.plot([row["active"] for row in own], [row["ratio"] for row in own], label=name, **mark)
    axis.set(xlabel="share of the blocks that is trained; the others are frozen", xlim=0, ylim=0)
    axis.set_ylabel("time of a step / time with nothing frozen")
    axis.grid()
    axis.legend()
    axis.set_title(title("Cost of a step with frozen blocks", result))
    return save(figure, path)


def host(result: dict, path: Path) -> Path:
    """Draws the host time of step(): a pair of points per variant."""
    rows = measured(result["host"])
    names = list(dict.fromkeys(label(row) for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1.8 + 0.3 * len(names)))
    for moving, color, marker in ((False, "#0072B2", "o"), (True, "#E69F00", "D")):
        own = [row for row in rows if row["moving"] is moving]
        places, us = [-names.index(label(row)) for row in own], [row["seconds"] * 1e6 for row in own]
        mark = {"color": color, "marker": marker, "linestyle": "none", "markersize": 8}
        axis.plot(us, places, label="addresses moving" if moving else "addresses fixed", **mark)
    axis.set_yticks([-place for place in range(len(names))], names)
    axis.set(xscale="log", xlabel="host time of step(), us")
    axis.xaxis.set_major_formatter(PLAIN)
    axis.xaxis.set_minor_formatter(PLAIN)
    axis.tick_params(which="both", labelsize=9)
    axis.grid(which="both")
    axis.legend()
    axis.set_title(title(f"Host time, {rows[0]['tensors'] if rows else 0} tensors", result))
    return save(figure, path)


def draw(results: dict[str, dict], folder: Path, contract: list[dict]) -> list[Path]:
    """Draws every figure that one machine has results for."""
    paths = []
    for benchmark in (*STEPS.values(), f"{STEPS['XLM-R-large']}_slow_peers"):
        if results.get(benchmark, {}).get("configs"):
            paths.append(step_ratios(results[benchmark], folder / f"{benchmark}.png"))
    large = results.get(STEPS["XLM-R-large"])
    if large and large["configs"]:
        paths.append(roofline(large, contract, folder / "roofline_gpu.png"))
    swept = results.get("sweeps_gpu")
    if swept:
        sizes, counts = measured(swept["sizes"]), measured(swept["counts"])
        if sizes:
            text = "A step on one tensor"
            paths.append(sweep(swept, sizes, "numel", "elements", text, folder / "sizes_gpu.png"))
        if counts:
            text = "A step on the same elements in more tensors"
            paths.append(sweep(swept, counts, "tensors", "tensors", text, folder / "tensors_gpu.png"))
        if measured(swept["frozen"]):
            paths.append(frozen(swept, folder / "frozen_gpu.png"))
    if "host_gpu" in results:
        paths.append(host(results["host_gpu"], folder / "host_gpu.png"))
    return paths
