"""Policies of single elements: GradDrop, GaussianGradDrop, RandomMask, GradDropEpoch."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import accumulate

from ..masks.plan import MaskPlan
from .clock import Clock, History, PlanContext, steps_by_epoch
from .policy import KEEP, KEPT_EPOCHS, Policy, _check_every, _check_p, _freeze_values
from .schedules import Schedule, drop_probability, quantize, require_epochs


@dataclass(frozen=True)
class GradDrop(Policy):
    """Drops each gradient element with probability p and multiplies the others by 1/(1-p) (Eq. 4).

    Args:
        p: drop probability in [0, 1), or a schedule epoch -> p (Anneal-GradDrop: ``LinearAnneal(epochs=T)``).
            It is quantised to 2^-16. p = 0 draws nothing.
        every: ``"step"`` redraws at every step, ``"epoch"`` at every epoch, with replacement (III-B, first form).

    Raises:
        ValueError: p outside of [0, 1), or one that rounds to 0 or 1 without being it; another ``every``.
    """

    p: Schedule = 0.2
    every: str = "step"
    draws = "bits"

    def __post_init__(self) -> None:
        _freeze_values(self, p=_check_p(self.p))
        _check_every(self, self.every)

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        clock = context.clock
        threshold = 65536 - self.kept_draws(clock.epoch)
        age_rate = self._age_rate(clock) if context.frozen and context.count_active_steps else 1.0
        if threshold == 0:
            return replace(KEEP, age_rate=age_rate)
        draw = clock.epoch if self.every == "epoch" else None
        return MaskPlan("bernoulli", context.frozen, threshold, 65536 / (65536 - threshold), draw, age_rate=age_rate)

    def counts_steps(self, frozen: bool) -> bool:
        return frozen

    def kept_draws(self, epoch: int) -> int:
        return 65536 - quantize(drop_probability(self.p, epoch))

    def _age_rate(self, clock: Clock) -> float:
        """The expected share of the past steps in which an element that is active now was active.

        Under random masks the true age of a frozen element is random. It would cost a counter per element; its
        expectation costs one number per group.
        """
        if clock.completed_steps == 0:
            return 1.0
        steps = clock.steps_by_epoch()
        same = steps.pop(clock.epoch, 0) * 65536 if self.every == "epoch" else 0  # drawn as now, hence all active
        kept = clock.folded + sum(self.kept_draws(epoch) * count for epoch, count in steps.items())
        return (kept + same) / 65536 / clock.completed_steps


@dataclass(frozen=True)
class GaussianGradDrop(Policy):
    """Multiplies each gradient element by a fresh draw from N(1, p/(1-p)). This is Gaussian dropout of the same mean
    and variance as GradDrop's mask (III-A).

    Args:
        p: number in [0, 1) or a schedule. It is quantised to 2^-16. Nothing is dropped, so ``masked=`` does not apply.

    Raises:
        ValueError: p outside of [0, 1), or one that rounds to 0 or 1 without being it.
    """

    p: Schedule = 0.2
    masked = None

    def __post_init__(self) -> None:
        _freeze_values(self, p=_check_p(self.p))

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        threshold = quantize(drop_probability(self.p, context.clock.epoch))
        return MaskPlan("gaussian", scale=math.sqrt(threshold / (65536 - threshold))) if threshold else KEEP

    def counts_steps(self, frozen: bool) -> bool:
        return False


@dataclass(frozen=True)
class RandomMask(Policy):
    """Trains one random share of the elements, the same in every step; the others are frozen (beyond the paper). The
    kernels draw the mask anew in each step, so nothing is stored.

    Args:
        density: share of the elements that is trained, in (0, 1). It is quantised to 2^-16.

    Raises:
        ValueError: ``density`` is missing or outside of (0, 1), or rounds to 0 or 1.
    """

    density: float = None  # type: ignore[assignment]  # left out, it is refused with a message that says what it is
    masked = "frozen"
    draws = "bits"

    def __post_init__(self) -> None:
        density = self.density
        usable = isinstance(density, (int, float)) and not isinstance(density, bool) and 0 < density < 1
        if not usable or not 0 < round(density * 65536) < 65536:
            raise ValueError(
                "RandomMask(density=) must be the share of elements to train, between 2^-16 = 1.53e-05 and 1 - 2^-16, "
                f"got {density!r}; for all of them use mask=None"
            )

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        return MaskPlan("bernoulli", context.frozen, threshold=65536 - round(self.density * 65536), draw=0)

    def counts_steps(self, frozen: bool) -> bool:
        return False


@dataclass(frozen=True)
class GradDropEpoch(Policy):
    """GradDrop-Epoch: every element draws one of T buckets once. Epoch e trains the elements of buckets 0..e, the
    others are frozen (III-B, figure 1).

    Args:
        epochs: number of training epochs T, 1 to 4096. The last one trains every element, and so do later epochs.
        toggle: trains only bucket e, so that every element is trained in exactly one epoch (GradDrop-Epoch-Toggle).
        storage: ``"recompute"`` redraws the bucket in the kernel and stores nothing. ``"bitpacked"`` keeps it as
            ceil(log2 T) bits per element. The training is the same bit for bit.

    Raises:
        ValueError: ``epochs`` is missing or out of range; another ``storage``.
    """

    epochs: int = None  # type: ignore[assignment]  # left out, it is refused with a message that says what it is
    toggle: bool = False
    storage: str = "recompute"
    masked = "frozen"
    follows_epochs = True

    def __post_init__(self) -> None:
        require_epochs("GradDropEpoch(epochs=)", self.epochs)
        if self.epochs > 4096:
            raise ValueError(
                f"GradDropEpoch(epochs=) can be at most 4096: a bucket comes from 16 random bits; got {self.epochs}"
            )
        if self.storage not in ("bitpacked", "recompute"):
            raise ValueError(f"GradDropEpoch(storage=) must be 'bitpacked' or 'recompute', got {self.storage!r}")

    @property
    def draws(self) -> str | None:  # type: ignore[override]  # depends on a value
        return "bits" if self.storage == "recompute" else None

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        epoch = min(context.clock.epoch, self.epochs - 1)
        first = epoch if self.toggle else 0
        if self.epochs == 1 or (not context.frozen and first == 0 and epoch == self.epochs - 1):
            return KEEP  # nothing is masked, and every element is as old as its parameter
        ages = self._ages(context.clock, first, epoch) if context.frozen and context.count_active_steps else ()
        return MaskPlan(
            "bucket",
            context.frozen,
            buckets=self.epochs,
            first_bucket=first,
            last_bucket=epoch,
            bitpacked=self.storage == "bitpacked",
            ages=ages,
        )

    def fold(self, history: History, folded: int) -> tuple[History, int]:
        """Keeps the steps of every epoch, the last one's and those of all later ones together."""
        if len(history) <= KEPT_EPOCHS + self.epochs:
            return history, folded
        *past, (epoch, start) = history
        steps = steps_by_epoch(tuple((min(epoch, self.epochs - 1), begin) for epoch, begin in past), start)
        ends = accumulate((steps[epoch] for epoch in sorted(steps)), initial=past[0][1])
        return (*zip(sorted(steps), ends), (epoch, start)), folded

    def after_last_epoch(self, epoch: int) -> str | None:
        if not self.toggle or epoch < self.epochs:
            return None
        # The message leaves out the epoch, so that it is shown once.
        return (
            f"training goes on after the last epoch of GradDropEpoch(epochs={self.epochs}, toggle=True): "
            "its last bucket goes on being trained"
        )

    def _ages(self, clock: Clock, first: int, last: int) -> tuple[int, ...]:
        """Per bucket, the number of steps in which it was active, this one included; 0 if it is not active now."""
        steps = [0] * self.epochs
        for epoch, count in clock.steps_by_epoch().items():
            steps[min(epoch, self.epochs - 1)] += count
        if not self.toggle:  # a bucket is active in its own epoch and in all later ones
            steps = list(accumulate(reversed(steps)))[::-1]
        before = 1 + clock.folded // 65536  # this step, and folded ones of another policy
        return tuple([0] * first + [before + count for count in steps[first : last + 1]])
