"""The mask rule in PyTorch: which elements a MaskPlan keeps. Read it beside csrc/mask.h."""

from collections.abc import Callable
from typing import Any

import torch

from .bitmask import element_buckets, planes_to_buckets, unpack
from .philox import DOMAIN_ELEMENT, uniform16
from .plan import MaskPlan
from .row_block import RowBlock

# by_runs(): a call costs 300 us, as much as this many more numbers of 40 ns each. So short gaps are drawn too.
_GAP = 8192
_DRAWN_AT_ONCE = 1 << 20


def keep_and_bucket(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, mask_words: Any = None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(keep, bucket) of every element in local order, shape (numel,): the mask rule.

    keep is a bool tensor, or None if the plan drops no single elements. bucket is an int64 tensor, or None if the plan
    has no buckets.
    """
    if plan.kind == "bernoulli":
        draw = completed_steps if plan.draw is None else plan.draw
        u16 = by_runs(layout, numel, device, lambda *run: uniform16(key, draw, DOMAIN_ELEMENT, *run))
        return u16 >= plan.threshold, None
    if plan.kind == "bucket":
        if plan.bitpacked:
            bucket = planes_to_buckets(mask_words, numel)
        else:
            bucket = by_runs(layout, numel, device, lambda *run: element_buckets(key, plan.buckets, *run))
        return (bucket >= plan.first_bucket) & (bucket <= plan.last_bucket), bucket
    if plan.kind == "fixed":
        return unpack(mask_words, numel), None
    return None, None


def by_runs(
    layout: RowBlock, numel: int, device: torch.device | None, draws: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Calls ``draws(first global index, count, device)`` for the contiguous runs of a layout. Returns the draws in
    local order.
    """
    inner, outer = layout.local_inner, layout.global_inner
    rows = numel // inner
    parts, done = [], 0
    if rows > 1 and outer - inner < _GAP:
        at_once = max(_DRAWN_AT_ONCE // outer, 1)
        for row in range(0, rows, at_once):
            count = min(at_once, rows - row)
            drawn = draws(layout.base + row * outer, (count - 1) * outer + inner, device)
            parts.append(drawn.as_strided((count, inner), (outer, 1)).flatten())
        done = rows * inner
    parts += [draws(first, count, device) for start, first, count in layout.runs(numel) if start >= done]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
