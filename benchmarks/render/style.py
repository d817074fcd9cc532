"""Colours, marks, titles and files of all figures. Needs matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can distinguish; shapes carry the same information.
TARGET = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#000000", "#8C564B")
MARKERS = ("o", "^", "D", "v", "P", "X", "*", "s")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 12, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.dpi": 130, "grid.color": "#DDDDDD"})


def title(text: str, result: dict) -> str:
    """Returns the text above the machine: the GPU for its own results, marked if they are a rehearsal, or the CPU."""
    facts = result["machine"]
    if "rehearsal" in result:
        where = facts["gpu"]["name"] if facts["gpu"] else "no GPU"
        doubt = "\nA REHEARSAL ON CPU TENSORS, NO MEASUREMENT" if result["rehearsal"] else ""
    else:
        where = f"{facts['cpu']}, {facts['cores']} cores"
        doubt = "\nQUICK RUN, NO MEASUREMENT" if result["quick"] else ""
    return f"{text}\n{where}, torch {facts['torch']}{doubt}"


def save(figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path
