"""plot_mask(): the masks of an optimizer's next step, as a picture. Needs matplotlib."""

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import backends
from ..groups.masking import require_optimizer
from ..groups.names import block_of
from ..masks import bitmask
from ..masks.bitmask import count_kept
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock
from .describe import clock_text
from .figures import block_labels, finish, label_ticks, new_figure, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..optimizer import FusedGradDropAdamW

SAMPLE = 4096  # elements of a tensor that are drawn of a random mask, at most
CROP = 256  # rows and columns of a mask that are shown, at most
_RUNS = 4  # contiguous runs that make the sample


def plot_mask(
    optimizer: "FusedGradDropAdamW", path: str | os.PathLike[str] | None = None, *,
    param: torch.Tensor | str | None = None,
) -> "Figure":  # fmt: skip
    """The masks of the next step: a figure of two pictures.

    Left, the share of the elements that is kept: kinds of tensors (their names inside a block, numbers as ``*``) x
    blocks, the column ``outside`` for tensors that are in none; another colour where there is no such tensor. Blocks
    are those of ``param_groups`` or of a policy's ``layers``; where there are neither, the numbered parts of the names.
    Tensors without names are one row a group.
    Right, the keep mask of one parameter, from its first element on.

    The masks of a whole model are never made: the shares are exact for blocks and fixed masks; of a random mask at most
    4,096 elements of each tensor are drawn, in four runs spread over it (standard deviation of such a share: at most
    0.8%); the picture on the right is 256 x 256 elements at most.

    Args:
        optimizer: a FusedGradDropAdamW. It is not changed.
        path: where to save the figure too; its ending says the format.
        param: the parameter on the right, or its name. Its first dimension is the rows, the others together are the
            columns; a vector is one row. Default: the largest tensor of the groups that have a policy, else of all.

    Returns:
        A ``matplotlib.figure.Figure`` that pyplot does not know.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: another kind of optimizer.
        KeyError: no such parameter.
        ValueError: no parameters at all, or a ``param`` without elements.
    """
    require_optimizer("plot_mask", optimizer)
    index, position = _largest(optimizer) if param is None else optimizer._groups.find(param)
    group, record = optimizer.param_groups[index], optimizer._groups.records(index)[position]
    crop = _crop(optimizer, index, position)
    shares, kinds, blocks = _shares_by_kind(optimizer)
    labels, stem = block_labels([block for block in blocks if block is not None])
    labels = labels + ["outside"] * (None in blocks)
    width, height = 3.5 + 0.3 * min(len(labels), 64), max(4.8, 2 + 0.24 * min(len(kinds), 64))
    figure = new_figure("plot_mask", (width + 5, height))
    left, right = figure.subplots(1, 2, width_ratios=(width, 5))
    image = picture(left, shares)
    label_ticks(left.set_yticks, kinds)
    label_ticks(left.set_xticks, labels, rotation=90)
    left.set_xlabel(f"block of {stem}" if stem else "block")
    left.set_title("share kept, by kind of tensor and block", fontsize=10)
    picture(right, crop.float().cpu().numpy())
    shape = " x ".join(map(str, group["params"][position].shape)) or "a scalar"
    shown = f"the first {crop.size(0)} x {crop.size(1)} elements of {shape}"
    right.set_title(f"{record.name}\n{shown}", fontsize=10)
    figure.colorbar(image, ax=right, label="share kept; right: 1 kept, 0 dropped")
    clocks = dict.fromkeys(map(clock_text, optimizer.param_groups))
    figure.suptitle(f"Masks of the next step ({'; '.join(clocks)})", fontsize=11)
    return finish(figure, path)


def _largest(optimizer: "FusedGradDropAdamW") -> tuple[int, int]:
    """(group, position) of the largest tensor of the groups with a policy, else of all."""
    places = [
        (group["mask"] is not None, param.numel(), index, position)
        for index, group in enumerate(optimizer.param_groups)
        for position, param in enumerate(group["params"])
    ]
    if not places:
        raise ValueError("plot_mask(optimizer): the optimizer has no parameters; add a group that is not empty")
    return max(places, key=lambda place: place[:2])[2:]


def _plan_of(optimizer: "FusedGradDropAdamW", index: int, position: int) -> MaskPlan:
    plan = optimizer._groups.plan(index, optimizer._groups.records(index)[position].unit)
    return replace(plan, bitpacked=False)  # the same masks, with nothing to be stored for the whole tensor


def _keep(optimizer: "FusedGradDropAdamW", index: int, position: int, layout: RowBlock, numel: int) -> torch.Tensor:
    """The keep mask of ``numel`` of a parameter's elements, bool, shape (numel,)."""
    group, record = optimizer.param_groups[index], optimizer._groups.records(index)[position]
    param, plan = group["params"][position], _plan_of(optimizer, index, position)
    if plan.kind == "fixed":
        words = _fixed_words(optimizer, index, record.name)
        runs = [_bits(words, first, count) for _, first, count in layout.runs(numel)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.bool)
    completed_steps = int(optimizer.state.get(param, {}).get("step", 0))
    return backends.keep_mask(plan, record.key, completed_steps, layout, numel, None, param.device)


def _fixed_words(optimizer: "FusedGradDropAdamW", index: int, name: str) -> torch.Tensor:
    policy: Any = optimizer._groups.policy(index)  # a FixedMask
    words: torch.Tensor = policy.words[name]
    return words


def _bits(words: torch.Tensor, first: int, count: int) -> torch.Tensor:
    skipped = first % 32
    return bitmask.unpack(words[first // 32 : (first + count + 31) // 32], skipped + count)[skipped:]


def _crop(optimizer: "FusedGradDropAdamW", index: int, position: int) -> torch.Tensor:
    """The keep mask of a parameter's first rows and columns, bool [at most CROP, at most CROP]."""
    param = optimizer.param_groups[index]["params"][position]
    if not param.numel():
        raise ValueError(f"plot_mask(param=): the parameter has no elements, shape {tuple(param.shape)}; name another")
    columns = param.numel() // (param.shape[0] if param.dim() > 1 else 1)
    rows, width = min(param.numel() // columns, CROP), min(columns, CROP)
    return _keep(optimizer, index, position, RowBlock(0, width, columns), rows * width).view(rows, width)


def _share(optimizer: "FusedGradDropAdamW", index: int, position: int) -> float:
    """The share of a parameter's elements that the next step keeps; of a large random mask that of a sample."""
    numel: int = optimizer.param_groups[index]["params"][position].numel()
    plan = _plan_of(optimizer, index, position)
    if plan.kind == "fixed":
        record = optimizer._groups.records(index)[position]
        return count_kept(_fixed_words(optimizer, index, record.name)) / numel
    if plan.kind not in ("bernoulli", "bucket"):
        return plan.active_fraction
    layout = RowBlock.whole(numel) if numel <= SAMPLE else RowBlock(0, SAMPLE // _RUNS, numel // _RUNS)
    return _keep(optimizer, index, position, layout, min(numel, SAMPLE)).double().mean().item()


def _shares_by_kind(optimizer: "FusedGradDropAdamW") -> tuple[np.ndarray[Any, Any], list[str], list[str | None]]:
    """(share kept, float [kinds, blocks], NaN where there is no such tensor; kinds; blocks, None last: outside)."""
    groups = optimizer.param_groups
    known: dict[str, None] = {}
    for index, group in enumerate(groups):
        known.update(dict.fromkeys([*group.get("blocks", ()), *optimizer._groups.blocks(index)]))
    kept: dict[tuple[str, str | None], list[float]] = {}
    for index, group in enumerate(groups):
        for position, (param, record) in enumerate(zip(group["params"], optimizer._groups.records(index))):
            if param.numel():
                block, kind = _place(record.name, known, "param_names" in group)
                sums = kept.setdefault((kind, block), [0.0, 0])
                sums[0] += _share(optimizer, index, position) * param.numel()
                sums[1] += param.numel()
    kinds, found = list(dict.fromkeys(kind for kind, _ in kept)), dict.fromkeys(block for _, block in kept)
    blocks = [*(known or (block for block in found if block is not None)), *([None] if None in found else [])]
    shares = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, block), (active, numel) in kept.items():
        shares[kinds.index(kind), blocks.index(block)] = active / numel
    return shares, kinds, blocks


def _place(name: str, known: dict[str, None], named: bool) -> tuple[str | None, str]:
    """(block, kind of tensor) of a parameter; one without a name is called "{group}.{position}"."""
    if not named:
        return None, f"group {name.partition('.')[0]}"
    block = block_of(name, known)
    if block is None and not known and (numbered := re.match(r"((?:[^.]+\.)*?\d+)\.", name)):
        block = numbered[1]
    kind = name if block is None else name[len(block) + 1 :]
    return block, re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "*", kind)
