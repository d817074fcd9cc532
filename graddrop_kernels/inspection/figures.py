"""Shared parts of the pictures. Uses no pyplot: no window, no global state, no figure to be closed."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_SHARES, _ABSENT = "Blues", "#F5DEC8"


def new_figure(function: str, size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{function}() needs matplotlib ({error}): pip install matplotlib") from error
    return Figure(figsize=size, layout="constrained")


def picture(axis: "Axes", values: np.ndarray[Any, Any], origin: Literal["upper", "lower"] = "upper") -> "AxesImage":
    """Draws shares in [0, 1], float [rows, columns], as an image. NaN has a colour of its own."""
    image = axis.imshow(values, _SHARES, vmin=0, vmax=1, aspect="auto", origin=origin, interpolation="nearest")
    image.set_cmap(image.get_cmap().with_extremes(bad=_ABSENT))
    return image


def label_ticks(set_ticks: Callable[..., Any], labels: Sequence[object], at_most: int = 64, **style: Any) -> None:
    """Labels the places 0, 1, ...; only every n-th where there are more than ``at_most``."""
    every = max(1, -(-len(labels) // at_most))
    set_ticks(range(0, len(labels), every), [str(label) for label in labels[::every]], **style)


def block_labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Returns (labels, their common part): the numbers alone if the names differ in nothing else."""
    parts = [name.rpartition(".") for name in names]
    if len({stem for stem, _, _ in parts}) == 1 and all(number.isdecimal() for _, _, number in parts):
        return [number for _, _, number in parts], parts[0][0]
    return list(names), ""


def finish(figure: "Figure", path: str | os.PathLike[str] | None) -> "Figure":
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
