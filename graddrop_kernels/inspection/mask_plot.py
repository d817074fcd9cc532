"""plot_mask(): the masks of an optimizer's next step, as a picture. Needs matplotlib."""

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import backends
from ..groups.masking import Masking, masking_of
from ..groups.names import block_of
from ..groups.owner import Owner
from ..groups.spans import kept_rows
from ..masks import bitmask
from ..masks.bitmask import count_kept
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock
from .describe import clock_text
from .figures import block_labels, finish, label_ticks, new_figure, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE = 4096  # most elements per tensor that are drawn of a random mask
CROP = 256  # most rows and columns of a mask that are shown
_RUNS = 4  # contiguous runs that make up the sample


def plot_mask(
    optimizer: Owner, path: str | os.PathLike[str] | None = None, *,
    param: torch.Tensor | str | None = None,
) -> "Figure":  # fmt: skip
    """Draws the masks of the next step: a figure of two pictures.

    Left, the share of elements kept: kinds of tensors (their names inside a block, numbers as ``*``) x blocks. The
    column ``outside`` is for tensors in no block. Where there is no such tensor, the colour is another. Blocks are
    those of ``param_groups`` or of a policy's ``layers``; without either, the numbered parts of the names. Tensors
    without names share one row per group.
    Right, the keep mask of one parameter, from its first element on.

    The masks of a whole model are never made. The shares are exact for blocks and fixed masks. Of a random mask at most
    4,096 elements per tensor are drawn, in four runs spread over it (standard deviation of such a share: at most 0.8%).
    The picture on the right shows at most 256 x 256 elements.

    Args:
        optimizer: a FusedGradDropAdamW. It is not changed.
        path: where to save the figure too. The extension gives the format.
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
    masking = masking_of("plot_mask", optimizer)
    index, position = _largest(masking) if param is None else masking.find(param)
    group, record = masking[index], masking.records(index)[position]
    crop = _crop(masking, index, position)
    shares, kinds, blocks = _shares_by_kind(masking)
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
    clocks = dict.fromkeys(map(clock_text, masking.groups))
    figure.suptitle(f"Masks of the next step ({'; '.join(clocks)})", fontsize=11)
    return finish(figure, path)


def _largest(masking: Masking) -> tuple[int, int]:
    """(group, position) of the largest tensor of the groups with a policy, else of all."""
    places = [
        (group["mask"] is not None, param.numel(), index, position)
        for index, group in enumerate(masking.groups)
        for position, param in enumerate(group["params"])
    ]
    if not places:
        raise ValueError("plot_mask(optimizer): the optimizer has no parameters; add a group that is not empty")
    return max(places, key=lambda place: place[:2])[2:]


def _plan_of(masking: Masking, index: int, position: int) -> MaskPlan:
    plan = masking.plan(index, masking.records(index)[position].unit)
    return replace(plan, bitpacked=False)  # the same masks, without storage for the whole tensor


def _keep(masking: Masking, index: int, position: int, layout: RowBlock, numel: int) -> torch.Tensor:
    """Returns the keep mask of a parameter's elements in ``layout``: bool, shape (numel,)."""
    group, record = masking[index], masking.records(index)[position]
    param, plan = group["params"][position], _plan_of(masking, index, position)
    if plan.kind == "fixed":
        words = _fixed_words(masking, index, record.name)
        runs = [_bits(words, first, count) for _, first, count in layout.runs(numel)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.bool, device=words.device)
    if record.rows is not None:
        return kept_rows(param, record, layout, numel)
    completed_steps = masking.step_of(param)
    return backends.keep_mask(plan, record.key, completed_steps, layout, numel, None, param.device)


def _fixed_words(masking: Masking, index: int, name: str) -> torch.Tensor:
    policy: Any = masking.policy(index)  # a FixedMask
    words: torch.Tensor = policy.words[name]
    return words


def _bits(words: torch.Tensor, first: int, count: int) -> torch.Tensor:
    skipped = first % 32
    return bitmask.unpack(words[first // 32 : (first + count + 31) // 32], skipped + count)[skipped:]


def _crop(masking: Masking, index: int, position: int) -> torch.Tensor:
    """The keep mask of a parameter's first rows and columns, bool [at most CROP, at most CROP]."""
    param = masking[index]["params"][position]
    if not param.numel():
        raise ValueError(f"plot_mask(param=): the parameter has no elements, shape {tuple(param.shape)}; name another")
    columns = param.numel() // (param.shape[0] if param.dim() > 1 else 1)
    rows, width = min(param.numel() // columns, CROP), min(columns, CROP)
    return _keep(masking, index, position, RowBlock(0, width, columns), rows * width).view(rows, width)


def _share(masking: Masking, index: int, position: int) -> float:
    """Returns the share of a parameter's elements that the next step keeps; of a large random mask, a sample's."""
    param, record = masking[index]["params"][position], masking.records(index)[position]
    plan = _plan_of(masking, index, position)
    numel: int = param.numel()
    if record.rows is not None:
        share: float = record.rows.share(tuple(param.shape))
        return share
    if plan.kind == "fixed":
        return count_kept(_fixed_words(masking, index, record.name)) / numel
    if plan.kind not in ("bernoulli", "bucket"):
        return plan.active_fraction
    layout = RowBlock.whole(numel) if numel <= SAMPLE else RowBlock(0, SAMPLE // _RUNS, numel // _RUNS)
    return _keep(masking, index, position, layout, min(numel, SAMPLE)).double().mean().item()


def _shares_by_kind(masking: Masking) -> tuple[np.ndarray[Any, Any], list[str], list[str | None]]:
    """Returns (share kept, float [kinds, blocks], NaN where there is no such tensor; kinds; blocks, the last None:
    outside).
    """
    groups = masking.groups
    known: dict[str, None] = {}
    for index, group in enumerate(groups):
        known.update(dict.fromkeys([*group.get("blocks", ()), *masking.blocks(index)]))
    kept: dict[tuple[str, str | None], list[float]] = {}
    for index, group in enumerate(groups):
        for position, (param, record) in enumerate(zip(group["params"], masking.records(index))):
            if param.numel():
                block, kind = _place(record.name, known, "param_names" in group)
                sums = kept.setdefault((kind, block), [0.0, 0])
                sums[0] += _share(masking, index, position) * param.numel()
                sums[1] += param.numel()
    kinds, found = list(dict.fromkeys(kind for kind, _ in kept)), dict.fromkeys(block for _, block in kept)
    blocks = [*(known or (block for block in found if block is not None)), *([None] if None in found else [])]
    shares = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, block), (active, numel) in kept.items():
        shares[kinds.index(kind), blocks.index(block)] = active / numel
    return shares, kinds, blocks


def _place(name: str, known: dict[str, None], named: bool) -> tuple[str | None, str]:
    """Returns (block, kind of tensor) of a parameter. A parameter without a name is called "{group}.{position}"."""
    if not named:
        return None, f"group {name.partition('.')[0]}"
    block = block_of(name, known)
    if block is None and not known and (numbered := re.match(r"((?:[^.]+\.)*?\d+)\.", name)):
        block = numbered[1]
    kind = name if block is None else name[len(block) + 1 :]
    return block, re.sub(r"(?:^|(?<=\.))\d+(?=\.|$)", "*", kind)
