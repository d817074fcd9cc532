"""The pictures of docs/, each drawn from what the package does: a step that is watched, one Philox call, the schedules.

A picture also holds what it shows as text (SVG's description), so that a test can recognise an old picture, whatever
version of matplotlib has drawn it. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import graddrop_kernels
from graddrop_kernels import (
    ExponentialAnneal,
    FusedGradDropAdamW,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LinearAnneal,
    param_groups,
)
from graddrop_kernels.masks.philox import DOMAIN_ELEMENT, philox4x32_10, stream_key, uniform16
from graddrop_kernels.policies.clock import Clock, PlanContext
from graddrop_kernels.policies.schedules import quantize

PACKAGE = Path(graddrop_kernels.__file__).parent
KEPT, DROPPED, LINE = "#9CC3E6", "#F5DEC8", "#444444"


def calls_of_a_step() -> list[tuple[str, str, str]]:
    """Returns (calling module, called module, function) of the second step of a small model, each once, in order.

    The first step prepares what all others use again. Functions without a name are left out.
    """
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.ModuleDict({"encoder": torch.nn.TransformerEncoder(layer, 2), "head": torch.nn.Linear(16, 2)})
    optimizer = FusedGradDropAdamW(param_groups(model), mask=GradDrop(p=0.2), backend="reference")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    calls, modules = {}, ["training loop"]

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PACKAGE):
            return
        if event == "call":
            module = str(path.relative_to(PACKAGE).with_suffix("")).replace("/__init__", "")
            name = frame.f_code.co_name
            if module != modules[-1] and name.isidentifier():
                calls.setdefault((modules[-1], module, name))
            modules.append(module)
        elif event == "return" and len(modules) > 1:
            modules.pop()

    sys.setprofile(watch)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return list(calls)


def step(figure: Figure) -> str:
    """Draws modules from left to right in the order of their first call. Time runs down."""
    calls = calls_of_a_step()
    modules = list(dict.fromkeys(module for caller, called, _ in calls for module in (caller, called)))
    figure.set_size_inches(0.95 * len(modules), 0.3 * len(calls) + 1.4)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_xlim(-0.6, len(modules) - 0.2)
    axis.set_ylim(len(calls) + 0.5, -2.2)
    for place, module in enumerate(modules):
        axis.plot([place, place], [-0.4, len(calls)], color="#CCCCCC", linewidth=1, zorder=0)
        axis.text(place, -0.6, module, rotation=30, fontsize=9, weight="bold")
    for row, (caller, called, name) in enumerate(calls):
        start, end = modules.index(caller), modules.index(called)
        arrow = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (end, row + 0.3), (start, row + 0.3), arrowprops=arrow)
        axis.text(end + 0.06 if end > start else end - 0.06, row + 0.3, name, fontsize=8, va="center",
                  ha="left" if end > start else "right", backgroundcolor="white")  # fmt: skip
    return "; ".join(f"{caller} calls {called}.{name}" for caller, called, name in calls)


def draw(figure: Figure, name="encoder.layers.1.linear1.weight", seed=42, count=5, q=100, p=0.3) -> str:
    """Draws one call of Philox: counter and key, four words, eight halves, eight elements."""
    key, threshold = stream_key(name, seed), quantize(p)
    words = philox4x32_10(q, 0, count, DOMAIN_ELEMENT, key)
    elements = uniform16(key, count, DOMAIN_ELEMENT, 8 * q, 8).tolist()
    assert elements == [words[(i >> 1) & 3] >> (16 * (i & 1)) & 0xFFFF for i in range(8)], "the layout has changed"
    figure.set_size_inches(9, 3.9)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_xlim(-0.05, 8.05)
    axis.set_ylim(7.3, -0.2)

    def boxes(row: float, texts: list[str], colours: list[str], first=0.0, width=None) -> None:
        width = width or 8 / len(texts)
        for i, (text, colour) in enumerate(zip(texts, colours)):
            box = {"facecolor": colour, "edgecolor": LINE}
            axis.add_patch(matplotlib.patches.Rectangle((first + i * width, row), width, 0.9, **box))
            axis.text(first + (i + 0.5) * width, row + 0.45, text, fontsize=8.5, ha="center", va="center")

    counter = [f"q = i >> 3\n{q}", "q >> 32\n0", f"draw\n{count}", f"domain\n{DOMAIN_ELEMENT}"]
    boxes(0, counter, ["#EEEEEE"] * 4, width=1.3)
    boxes(0, [f"k0\n{key & 0xFFFFFFFF:08x}", f"k1\n{key >> 32:08x}"], ["#DDEBD3"] * 2, first=5.4, width=1.3)
    axis.text(0, 1.25, "counter", fontsize=8.5)
    axis.text(5.4, 1.25, f"key of {name!r}, seed {seed}", fontsize=8.5)
    axis.text(4, 1.85, "philox4x32_10", fontsize=10, ha="center", weight="bold")
    boxes(2.1, [f"word {i}\n{word:08x}" for i, word in enumerate(words)], ["#EEEEEE"] * 4)
    boxes(3.3, [f"{half} half\n{elements[2 * i + j]}" for i in range(4) for j, half in enumerate(("low", "high"))],
          ["white"] * 8)  # fmt: skip
    kept = [u16 >= threshold for u16 in elements]
    texts = [f"i = {8 * q + i}\n{'kept' if keep else 'dropped'}" for i, keep in enumerate(kept)]
    boxes(5.0, texts, [KEPT if keep else DROPPED for keep in kept])
    axis.text(0, 4.75, f"kept where u16 >= threshold = round({p} * 65536) = {threshold}", fontsize=8.5)
    scale = f"kept gradients times 65536 / {65536 - threshold}"
    axis.text(0, 6.5, f"element i of the whole parameter; {scale}", fontsize=8.5)
    return f"words {words}, u16 {elements}, kept {kept}"


def schedules(figure: Figure, epochs=5, blocks=12) -> str:
    """Draws p of the schedules, the share that the epoch policies train, and the blocks that GradFreeze trains."""
    figure.set_size_inches(11, 3.4)
    left, middle, right, last = figure.subplots(1, 4, width_ratios=(3, 3, 2, 2))
    shown = {}
    for p in (LinearAnneal(epochs), LinearAnneal(epochs, end="zero"), ExponentialAnneal(0.9, 0.5), 0.2):
        shown[str(p)] = [p(epoch) if callable(p) else p for epoch in range(epochs)]
        label = str(p).replace(f"epochs={epochs}, start=0.9, ", "")
        left.plot(range(epochs), shown[str(p)], "o-", label=label, markersize=4)
    left.set_title("drop probability p", fontsize=10)
    for policy in (GradDropEpoch(epochs), GradDropEpoch(epochs, toggle=True)):
        plans = [policy.plan(_context(epoch), None) for epoch in range(epochs)]
        shown[str(policy)] = [plan.active_fraction for plan in plans]
        label = f"GradDropEpoch({epochs}{', toggle=True' if policy.toggle else ''})"
        middle.plot(range(epochs), shown[str(policy)], "s-", label=label, markersize=4)
    middle.set_title("share of the elements trained", fontsize=10)
    for axis in (left, middle):
        axis.set_ylim(0, 1.5)  # room for the legend
        axis.set_yticks(np.arange(0, 1.1, 0.25))
        axis.legend(fontsize=7, loc="upper left")
        axis.grid(color="#DDDDDD")
    names = tuple(map(str, range(blocks)))
    for axis, direction in zip((right, last), ("top_down", "bottom_up")):
        policy = GradFreeze(epochs, direction=direction)
        keeps = [[policy.keeps(_context(epoch, names), name) for epoch in range(epochs)] for name in names]
        shown[str(policy)] = [sum(column) for column in zip(*keeps)]
        axis.imshow(keeps, matplotlib.colors.ListedColormap([DROPPED, KEPT]), aspect="auto", origin="lower")
        axis.set_title(f"GradFreeze, {direction}", fontsize=10)
        axis.set_ylabel("block")
    for axis in (left, middle, right, last):
        axis.set_xticks(range(epochs))
        axis.set_xlabel("epoch")
    return "; ".join(f"{name}: {', '.join(f'{value:.4g}' for value in values)}" for name, values in shown.items())


def _context(epoch: int, blocks: tuple[str, ...] = ()) -> PlanContext:
    return PlanContext(Clock(epoch, 0, ()), seed=0, frozen=True, count_active_steps=False, blocks=blocks)


PICTURES = {"step": step, "draw": draw, "schedules": schedules}


def draw_all(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in PICTURES.items():
        figure = Figure(layout="constrained")
        shown = picture(figure)
        paths.append(folder / f"{name}.svg")
        # Text is stored as text, and equal pictures give equal files.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(paths[-1], metadata={"Date": None, "Description": shown})
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "pictures")
    for path in draw_all(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
