"""plot_schedule(): a picture of what a policy keeps in each epoch. Needs matplotlib."""

import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..masks.bitmask import count_kept
from ..policies import FixedMask, GradDrop, Policy, SkipUpdate, TrainRows
from ..policies.clock import Clock, PlanContext
from ..policies.schedules import drop_probability, quantize, require_epochs
from .describe import policy_text
from .figures import block_labels, finish, label_ticks, new_figure, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_schedule(
    policy: Policy | None,
    epochs: int,
    path: str | os.PathLike[str] | None = None,
    *,
    blocks: int | Sequence[str] = 12,
    steps_per_epoch: int | None = None,
    seed: int = 0,
) -> "Figure":
    """Draws what a policy keeps in each epoch (sections III and IV of the paper). Needs no model.

    For policies of elements: the active share of the elements and, where there is one, the drop probability p.
    GaussianGradDrop drops nothing: the standard deviation of its factor is drawn too. For policies of blocks: a picture
    of blocks x epochs, the first block at the bottom.

    Args:
        policy: any policy, or None for plain AdamW.
        epochs: how many to show, 0 first; at least 1.
        path: where to save the figure too. The extension gives the format.
        blocks: for policies of blocks: how many (at least 1), or their names in forward order, ``[name for name, _ in
            find_blocks(model)]``. LayerGradDrop draws by name: with a number the picture shows the keep probabilities.
        steps_per_epoch: for LayerGradDrop with ``every="step"`` and names: shows the share of an epoch's steps in which
            a block is active, for this many steps (at least 1) per epoch. Takes about 10 us per block and step. None:
            the probabilities.
        seed: the optimizer's, in [0, 2^64), for LayerGradDrop with names.

    Returns:
        A ``matplotlib.figure.Figure`` that pyplot does not know.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: no policy.
        ValueError: an argument out of range, a schedule without a usable p at one of the epochs, or TrainRows, whose
            share depends on the model.
    """
    if isinstance(policy, TrainRows):
        raise ValueError(
            f"plot_schedule: {policy!r} trains the same rows in every epoch, a share that only the model shows: see "
            "describe(optimizer) and plot_mask(optimizer)"
        )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"plot_schedule(policy=) must be a policy such as GradDrop(p=0.2), or None; got {policy!r}")
    require_epochs("plot_schedule(epochs=)", epochs)
    if steps_per_epoch is not None and not _is_count(steps_per_epoch):
        raise ValueError(f"plot_schedule(steps_per_epoch=) must be an int >= 1 or None, got {steps_per_epoch!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"plot_schedule(seed=) must be an int in [0, 2^64), got {seed!r}")
    if not _is_count(blocks) and not _is_names(blocks):
        raise ValueError(f"plot_schedule(blocks=) must be an int >= 1, or a list of block names; got {blocks!r}")
    figure = new_figure("plot_schedule", (7.2, 4.4))
    axis = figure.subplots()
    if policy is not None and policy.needs_blocks:
        shares, meaning = _block_shares(policy, blocks, epochs, steps_per_epoch, seed)
        figure.colorbar(picture(axis, shares, origin="lower"), ax=axis, label=meaning)
        labels, stem = block_labels(_names(blocks))
        axis.set_ylabel(f"block of {stem}" if stem else "block")
        label_ticks(axis.set_yticks, labels)
    else:
        for style, (label, values) in zip(("o-", "s--", "^:"), _element_curves(policy, epochs).items()):
            axis.plot(range(epochs), values, style, label=label)
        axis.set_ylim(0, 1.05 * max(1.0, axis.get_ylim()[1]))
        axis.grid(color="#DDDDDD")
        axis.legend()
    axis.set_xlabel("epoch")
    label_ticks(axis.set_xticks, range(epochs), 20)
    axis.set_title(textwrap.fill(policy_text(policy), 90), fontsize=10)
    return finish(figure, path)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_names(blocks: object) -> bool:
    return isinstance(blocks, (list, tuple)) and len(blocks) > 0 and all(isinstance(name, str) for name in blocks)


def _names(blocks: int | Sequence[str]) -> list[str]:
    return list(map(str, range(blocks))) if isinstance(blocks, int) else list(blocks)


def _context(policy: Policy, epoch: int, step: int = 0, seed: int = 0, blocks: Sequence[str] = ()) -> PlanContext:
    return PlanContext(Clock(epoch, step, ()), seed, policy.masked == "frozen", False, tuple(blocks))


def _element_curves(policy: Policy | None, epochs: int) -> dict[str, list[float]]:
    """Returns {label: a value per epoch}."""
    if policy is None:
        return {"share active": [1.0] * epochs}
    if isinstance(policy, FixedMask):
        numel = sum(math.prod(shape) for shape in policy.shapes.values())
        share = sum(map(count_kept, policy.words.values())) / numel if numel else 1.0
        return {"share active, of the tensors with a mask": [share] * epochs}
    if isinstance(policy, SkipUpdate):
        policy = GradDrop(policy.p)  # whose elements are kept as often as its parameters
    plans = [policy.plan(_context(policy, epoch), None) for epoch in range(epochs)]
    curves = {"share active": [plan.active_fraction for plan in plans]}
    if hasattr(policy, "p"):
        curves["drop probability p"] = [quantize(drop_probability(policy.p, epoch)) / 65536 for epoch in range(epochs)]
    if any(plan.kind == "gaussian" for plan in plans):
        curves["standard deviation of the factor"] = [plan.scale * (plan.kind == "gaussian") for plan in plans]
    return curves


def _block_shares(
    policy: Any, blocks: int | Sequence[str], epochs: int, steps_per_epoch: int | None, seed: int
) -> tuple[np.ndarray[Any, Any], str]:
    """Returns (share kept, float [blocks, epochs]; what it means)."""
    names, every_step = _names(blocks), getattr(policy, "every", None) == "step"
    if hasattr(policy, "p") and (isinstance(blocks, int) or every_step and steps_per_epoch is None):
        keep = [1 - quantize(drop_probability(policy.p, epoch)) / 65536 for epoch in range(epochs)]
        return np.tile(keep, (len(names), 1)), "probability that a block is active"
    steps = steps_per_epoch if every_step and steps_per_epoch is not None else 1
    contexts = [
        [_context(policy, epoch, epoch * steps + step, seed, names) for step in range(steps)] for epoch in range(epochs)
    ]
    shares = [[np.mean([policy.keeps(context, name) for context in epoch]) for epoch in contexts] for name in names]
    return np.array(shares), f"share of {steps} steps in which a block is active" if every_step else "block is active"
