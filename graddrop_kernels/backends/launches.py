"""Launch: one kernel of a step on a GPU, and the chunks of rows that it takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..masks.bitmask import num_planes
from .batch import Hyper


@dataclass(frozen=True)
class Launch:
    """One call of the update kernel: its compile-time choices, and the chunks that it takes."""

    kind: str  # a MaskPlan's kind; "keep" also holds dropped blocks whose gradient counts as 0
    planes: int  # bit-planes to read a bucket from; -1: recompute it
    aligned: bool  # every address is a multiple of 16 bytes, and eight elements in a row share one Philox call
    rows: bool  # the elements are not one contiguous run of the whole parameter
    amsgrad: bool
    update: bool  # all rows have masked="update", or keep everything
    cautious: bool  # all rows decay cautiously
    frozen: bool  # some row keeps its dropped elements as they are
    ages: bool  # some row has a bias correction for every bucket
    chunks: Any = None  # int64 tensor: row of a tensor << 40 | number of the chunk in it


class Kind(NamedTuple):
    """The properties of a MaskPlan that its launch depends on."""

    name: str
    planes: int = -1
    frozen: bool = False
    ages: bool = False
    update: bool = False
    cautious: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether the mask is drawn and nothing is read for it. Its launch then takes rows that keep everything too."""
        return self.name in ("bernoulli", "gaussian", "bucket") and self.planes < 0


def kind_of(hyper: Hyper) -> Kind | None:
    """The Kind of a plan and its way of decay, or None if the plan touches nothing."""
    plan = hyper.plan
    if plan.kind == "off" and plan.frozen:
        return None
    if plan.kind in ("off", "keep") and not plan.update:
        return Kind(plan.kind, cautious=hyper.cautious)
    if plan.kind in ("off", "keep"):  # kept and dropped in turn, by one launch: one bucket, inside of the range or not
        return Kind("bucket", planes=0, update=True, cautious=hyper.cautious)
    planes = num_planes(plan.buckets) if plan.kind == "bucket" and plan.bitpacked else -1
    return Kind(plan.kind, planes, plan.frozen, bool(plan.ages), plan.update, hyper.cautious)


def in_eights(base: Any, local_inner: Any, global_inner: Any, numel: Any) -> Any:
    """Whether any eight local elements of a RowBlock that begin at a multiple of 8 share one Philox call. For numbers,
    or for arrays of them.
    """
    return (base % 8 == 0) & ((numel <= local_inner) | ((local_inner % 8 == 0) & (global_inner % 8 == 0)))
