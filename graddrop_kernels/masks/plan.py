"""MaskPlan: the mask of one step for a set of parameters, in plain numbers. No tensors, no devices.

A policy and the group's Clock make plans; the backends carry them out and know nothing of policies, groups or
schedules.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MaskPlan:
    """One mask rule. ``kind`` says which fields matter:

    ``keep``       every element is updated as AdamW does.
    ``off``        no element is: a dropped block. With ``frozen`` the tensors are not touched at all.
    ``bernoulli``  an element is kept when its 16-bit draw is >= ``threshold``;
                   kept gradients are multiplied by ``scale``.
    ``gaussian``   every gradient is multiplied by N(1, ``scale``^2).
    ``bucket``     an element is kept when first_bucket <= bucket <= last_bucket, out of ``buckets``.
    ``fixed``      an element is kept when its bit in the given mask is set; kept gradients are multiplied by ``scale``.
    """

    kind: str
    frozen: bool = False  # dropped elements: param and moments untouched; else their gradient is 0
    threshold: int = 0  # round(p * 2^16)
    scale: float = 1.0
    draw: int | None = None  # the Philox draw; None: the parameter's own step before this update
    buckets: int = 0
    first_bucket: int = 0
    last_bucket: int = 0
    bitpacked: bool = False
    # The step of the bias corrections. The default is the parameter's own step t after this update (1 first).
    ages: tuple[int, ...] = ()  # per bucket, steps in which it was active, this one included; at most t
    age_rate: float = (
        1.0  # expected share of the past steps in which an element active now was active: 1 + (t - 1) * age_rate
    )
    global_step: int = 0  # not 0: this number instead
    # masked="update": the moments see the whole gradient. ``scale`` is on the update of kept elements, of any kind, and
    # dropped ones keep their parameter.
    update: bool = False

    @property
    def active_fraction(self) -> float:
        """The share of elements kept, exact for the quantised p. 1 for a fixed mask, whose share only its bits show."""
        if self.kind == "off":
            return 0.0
        if self.kind == "bernoulli":
            return 1 - self.threshold / 65536
        if self.kind == "bucket":  # draws u with first <= (u * buckets) >> 16 <= last
            return (
                _first_draw(self.last_bucket + 1, self.buckets) - _first_draw(self.first_bucket, self.buckets)
            ) / 65536
        return 1.0


def _first_draw(bucket: int, buckets: int) -> int:
    """The smallest 16-bit draw that falls into ``bucket`` or a later one."""
    return -(-bucket * 65536 // buckets)
