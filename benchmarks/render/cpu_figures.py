"""Draws figures from the CPU's results."""

from pathlib import Path

import matplotlib.pyplot as plt

from graddrop_kernels.demo import report

from .cpu_tables import DTYPES, config_of, names_of, row_of, threads_of
from .style import COLORS, MARKERS, PLAIN, TARGET, save, title

ISA_STYLE = {
    "avx512_bf16": ("#0072B2", "o"),
    "avx512": ("#56B4E9", "D"),
    "avx2": ("#E69F00", "s"),
    "neon": ("#009E73", "^"),
    "portable": ("#CC79A7", "v"),
    None: ("#4D4D4D", "X"),  # torch
}


def step_ratios(result: dict, folder: Path) -> Path:
    """Draws a panel per layout and thread count: time over torch fused, a row per variant, a marker per instruction
    set.
    """
    runs, layouts = result["runs"], ("layers", "one tensor")
    names = {layout: names_of([config_of(run, layout) for run in runs], "ours", "peer") for layout in layouts}
    heights = [len(names[layout]) for layout in layouts]
    size = (3.2 + 4.4 * len(runs), 1.6 + 0.33 * sum(heights))
    figure, axes = plt.subplots(
        len(layouts), len(runs), figsize=size, sharex=True, sharey="row", squeeze=False, height_ratios=heights
    )
    shown = {}
    for axis_row, layout in zip(axes, layouts):
        places = {name: -place for place, name in enumerate(names[layout])}
        for axis, run in zip(axis_row, runs):
            config = config_of(run, layout)
            axis.axvline(1, color=TARGET, linewidth=1.6, zorder=1)
            for row in config["rows"]:
                if row["name"] in places:
                    color, marker = ISA_STYLE[row["isa"]]
                    place = places[row["name"]]
                    axis.plot([row["ratio_p20"], row["ratio_p80"]], [place, place], color=color, linewidth=2, alpha=0.5)
                    dot = axis.plot(row["ratio"], place, marker, color=color, markersize=7, linestyle="none")
                    shown[row["isa"] or "torch"] = dot[0]
            tensors = "one tensor" if config["tensors"] == 1 else f"{config['tensors']} tensors"
            axis.set_title(f"{tensors}, {threads_of(run)}")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(PLAIN)
            axis.tick_params(labelbottom=True)
            axis.grid(axis="x")
        axis_row[0].set_yticks(list(places.values()), list(places))
    figure.supxlabel("time of a step / time of torch's unmasked fused AdamW (line: 1.0); bars: 20th to 80th percentile")
    millions = config_of(runs[0], "layers")["numel"] / 1e6
    figure.suptitle(title(f"Optimizer step, {result['dtype']}, {millions:.3g}M parameters", result))
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    return save(figure, folder / f"{result['benchmark']}.png")


def frozen_blocks(results: dict, folder: Path) -> Path:
    """Draws time against the share of layers that is trained."""
    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    axis.plot([0, 1], [0, 1], color=TARGET, linewidth=1.6, label="in proportion")
    runs = [(result["dtype"], run) for result in results.values() for run in result["runs"]]
    for (dtype, run), color, marker in zip(runs, COLORS, MARKERS):
        sweep = [row for row in config_of(run, "layers")["rows"] if row["kind"] == "sweep"]
        shares, times = [row["active"] for row in sweep], [row["seconds"] / sweep[0]["seconds"] for row in sweep]
        label = f"{dtype}, {threads_of(run)}"
        axis.plot(shares, times, marker, color=color, markersize=8, alpha=0.8, label=label)
    axis.set(xlabel="share of the layers that is trained; the others are frozen", xlim=0, ylim=0)
    axis.set_ylabel("time of a step / time with nothing frozen")
    axis.grid()
    axis.legend()
    axis.set_title(title("Cost of a step with frozen blocks", next(iter(results.values()))))
    return save(figure, folder / "frozen_blocks.png")


def bandwidth(results: dict, folder: Path) -> Path:
    """Draws the GB/s of whole steps beside those of the bare AdamW pattern on the same threads."""
    names = ("torch fused", "mask=None", "GradDrop", "GradDropEpoch, bit-packed", "FixedMask, 50 %")
    runs = [(result["dtype"], run) for result in results.values() for run in result["runs"]]
    figure, axis = plt.subplots(figsize=(2.6 + 2 * len(runs), 4.8))
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, COLORS)):
        speeds = [row_of(config_of(run, "layers"), name)["gb_per_s"] for _, run in runs]
        places = [place - 0.4 + width * (i + 0.5) for place in range(len(runs))]
        axis.bar(places, speeds, 0.92 * width, color=color, label=name)
    reached = [(place, run["bandwidth"]["adamw"]) for place, (_, run) in enumerate(runs) if run["bandwidth"]["adamw"]]
    places, speeds = [place for place, _ in reached], [found["gb_per_s"] for _, found in reached]
    label = "4 reads and 3 writes, nothing else"
    axis.hlines(speeds, [x - 0.45 for x in places], [x + 0.45 for x in places], TARGET, linewidth=2, label=label)
    axis.set_xticks(range(len(runs)), [f"{dtype}\n{threads_of(run)}" for dtype, run in runs])
    axis.set(ylabel="memory traffic of a step, GB/s", ylim=0)
    axis.set_title(title("Memory bandwidth that a step reaches", next(iter(results.values()))))
    figure.legend(loc="outside lower center", ncols=3)
    return save(figure, folder / "bandwidth.png")


def host_overhead(result: dict, folder: Path) -> Path:
    """Draws the time of a step over tensors of one element against their number."""
    figure, axis = plt.subplots(figsize=(7.4, 5.2))
    counts = sorted({row["tensors"] for row in result["rows"]})
    for name, color, marker in zip(dict.fromkeys(row["name"] for row in result["rows"]), COLORS, MARKERS):
        rows = [row for row in result["rows"] if row["name"] == name]
        is_peer, is_target = rows[0]["kind"] == "peer", name == "torch fused"
        style = {"linestyle": "--" if is_peer else "-", "linewidth": 2.6 if is_target else 1.5, "marker": marker}
        style["color"] = TARGET if is_target else color
        axis.plot([row["tensors"] for row in rows], [row["seconds"] * 1e3 for row in rows], label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="tensors of one element", ylabel="time of a step, ms")
    axis.set_xticks(counts, counts)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(PLAIN)
    axis.grid()
    axis.legend(fontsize=10)
    axis.set_title(title("Host overhead of a step (dashed: torch, unmasked)", result))
    return save(figure, folder / "host_overhead.png")


def memory(result: dict, folder: Path) -> Path:
    """Draws the bytes per parameter that each optimizer keeps, and those that a step takes for itself; a panel per pair
    of dtypes.
    """
    kinds = list(dict.fromkeys((row["dtype"], row["moment_dtype"]) for row in result["rows"]))
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    size = (3 + 3.4 * len(kinds), 1.9 + 0.32 * len(names))
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False)
    widest = 0.0
    for axis, kind in zip(axes.flat, kinds):
        rows = [row for row in result["rows"] if (row["dtype"], row["moment_dtype"]) == kind]
        places = [-names.index(row["name"]) for row in rows]
        kept = [row["kept_per_param"] for row in rows]
        masks = [row["mask_bits"] / 8 for row in rows]
        moments = [all_bytes - mask for all_bytes, mask in zip(kept, masks)]
        peaks = [row["step_peak_per_param"] or 0 for row in rows]
        axis.barh(places, moments, color="#0072B2", label="moments and step counts")
        axis.barh(places, masks, left=moments, color="#E69F00", label="stored masks")
        style = {"color": "#CC79A7", "hatch": "///", "edgecolor": "white"}
        axis.barh(places, peaks, left=kept, label="during a step only", **style)
        for place, total in zip(places, map(sum, zip(kept, peaks))):
            widest = max(widest, total)
            axis.annotate(f"{total:.2f}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axis.axvline(moments[0], color=TARGET, linewidth=1.6)
        axis.set_title(f"{kind[0]}, moments {kind[1]}")
    axes[0, 0].set_yticks([-place for place in range(len(names))], names)
    axes[0, 0].set_xlim(0, 1.18 * widest)
    axes[0, len(kinds) // 2].set_xlabel("bytes per parameter, beside parameter and gradient (line: AdamW's state)")
    figure.suptitle(title("Memory of the optimizer", result))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(figure, folder / "memory.png")


def precision(result: dict, folder: Path) -> Path:
    """Draws the training loss by step, a line per way of keeping the weights: the mean over the seeds, and all of them
    as a band.
    """
    figure, axis = plt.subplots(figsize=(9, 5.2))
    for number, weights in enumerate(dict.fromkeys(row["weights"] for row in result["rows"])):
        curves = [report.smooth(row["losses"]) for row in result["rows"] if row["weights"] == weights]
        lowest, mean, highest = zip(*((min(step), sum(step) / len(step), max(step)) for step in zip(*curves)))
        steps = range(1, len(mean) + 1)
        axis.fill_between(steps, lowest, highest, color=COLORS[number], alpha=0.15, linewidth=0)
        axis.plot(steps, mean, color=COLORS[number], marker=MARKERS[number], markevery=12, label=weights)
    axis.set(xlabel="step", ylabel=f"training loss, mean of {report.SMOOTHING} steps", ylim=(0, None))
    axis.grid(axis="y")
    axis.legend(title=f"weights; line: mean of {len(curves)} seeds, band: all of them")
    figure.suptitle(title(f"{result['method']}, {result['model']}, SIB-200 topics in English", result))
    return save(figure, folder / "precision.png")


def sampled_blocks(result: dict, folder: Path) -> Path:
    """Draws the loss and the bytes that the optimizer keeps, by step, a line per way to train."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2))
    rows = [row for row in result["rows"] if "error" not in row and row["kind"] != "check"]
    for row, color, marker in zip(rows, COLORS, MARKERS):
        style = {"color": color, "marker": marker, "markevery": 6, "label": row["name"]}
        style["linestyle"] = "--" if row["kind"] == "peer" else "-"
        steps = range(1, len(row["losses"]) + 1)
        axes[0].plot(steps, report.smooth(row["losses"]), **style)
        axes[1].plot(steps, [kept / 1e6 for kept in row["kept"]], **style)
    axes[0].set(xlabel="step", ylabel=f"training loss, mean of {report.SMOOTHING} steps")
    axes[1].set(xlabel="step", ylabel="kept by the optimizer after the step, MB", ylim=0)
    for axis in axes:
        axis.grid(axis="y")
    axes[0].legend()
    every = f"{result['layers']} blocks, others every {result['every']} steps (dashed: other code)"
    figure.suptitle(title(every, result))
    return save(figure, folder / "sampled_blocks.png")


def draw(results: dict[str, dict], folder: Path) -> list[Path]:
    """Draws every figure that one machine has results for."""
    steps = {name: results[name] for name in (f"step_cpu_{dtype}" for dtype in DTYPES) if name in results}
    paths = [step_ratios(result, folder) for result in steps.values()]
    if steps:
        paths += [frozen_blocks(steps, folder), bandwidth(steps, folder)]
    figures = {"host_overhead": host_overhead, "memory": memory, "precision": precision}
    figures["sampled_blocks"] = sampled_blocks
    return paths + [figure(results[name], folder) for name, figure in figures.items() if name in results]
