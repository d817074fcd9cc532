"""The launches of a step on a GPU: which chunks of which rows one kernel takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..masks.bitmask import num_planes
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock


@dataclass(frozen=True)
class Launch:
    """One call of the update kernel: what is compiled in, and the chunks it walks."""

    kind: str  # a MaskPlan's kind; "keep" also holds dropped blocks whose gradient counts as 0
    planes: int  # bit-planes to read a bucket from; -1: recompute it
    aligned: bool  # every address is a multiple of 16 bytes and eight elements in a row are one Philox call
    rows: bool  # aligned: the elements are not one contiguous run of the whole parameter
    amsgrad: bool
    frozen: bool  # some row keeps its dropped elements as they are
    ages: bool  # some row has a bias correction for every bucket
    chunks: Any = None  # int64 tensor: tensor << 40 | number of the chunk in it


class _Kind(NamedTuple):
    """What of a MaskPlan decides about its launch."""

    name: str
    planes: int = -1
    frozen: bool = False
    ages: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether rows that keep everything can be among its rows: nothing is read for the mask."""
        return self.name in ("bernoulli", "gaussian", "bucket") and self.planes < 0


def _kind_of(plan: MaskPlan) -> _Kind | None:
    """None for a plan that touches nothing."""
    if plan.kind == "off" and plan.frozen:
        return None
    if plan.kind in ("off", "keep"):
        return _Kind(plan.kind)
    planes = num_planes(plan.buckets) if plan.kind == "bucket" and plan.bitpacked else -1
    return _Kind(plan.kind, planes, plan.frozen, bool(plan.ages))


def in_eights(layout: RowBlock, numel: int) -> bool:
    """Whether eight local elements from a multiple of 8 on are always one Philox call."""
    one_run = numel <= layout.local_inner
    return layout.base % 8 == 0 and (one_run or (layout.local_inner % 8 == 0 and layout.global_inner % 8 == 0))
