"""Mask policies: WHAT is dropped, one class a row of the paper (O'Neill & Dutta,
"Gradient Sparsification For Masked Fine-Tuning of Transformers").

A policy is an immutable value. It turns a PlanContext into a MaskPlan for each of its units (the whole group, or a
block) and knows no tensor but FixedMask's own. ``masked`` says what dropping means by default: ``"gradient"``: the
gradient is 0, so that moments decay and the weight still moves by momentum and weight decay; ``"frozen"``: parameter
and moments stay as they are, bit for bit.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..masks import bitmask
from ..masks.philox import block_uniform16, stream_key
from ..masks.plan import MaskPlan
from .clock import Clock, PlanContext
from .schedules import ExponentialAnneal, LinearAnneal, Schedule, drop_probability, quantize, require_epochs

KEEP = MaskPlan("keep")
_SCHEDULES = {cls.__name__: cls for cls in (LinearAnneal, ExponentialAnneal)}


class Policy:
    """Base of the policies: the JSON form, and the defaults that element policies share."""

    masked: str | None = "gradient"
    needs_blocks = False
    layers: tuple[str, ...] | None = None

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        """The mask of one step for one ``unit``; units are what ``unit`` below returns."""
        raise NotImplementedError

    def unit(self, name: str, block: str | None) -> Hashable:
        """What decides about this parameter: parameters of one unit share a plan."""
        return None

    @property
    def follows_epochs(self) -> bool:
        """Whether ``set_epoch`` changes anything."""
        return callable(getattr(self, "p", None)) or getattr(self, "every", None) == "epoch"

    def counts_steps(self, frozen: bool) -> bool:
        """Whether plans depend on how many steps the group has completed."""
        return True

    def check_epoch(self, epoch: int) -> None:
        """Raises ValueError when a schedule has no usable p at this epoch."""
        p = getattr(self, "p", None)
        if callable(p):
            quantize(drop_probability(p, epoch))

    def after_last_epoch(self, epoch: int) -> str | None:
        """What the user should be warned of when training goes on to this epoch; None: nothing."""
        return None

    def to_json(self) -> str:
        """One canonical string; equal policies give equal strings."""
        return json.dumps({"policy": type(self).__name__, **self._values()}, sort_keys=True, separators=(",", ":"))

    def _values(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]  # dataclasses all

    @property
    def rebuildable(self) -> bool:
        """Whether ``from_json`` can restore the policy: not with a callable p, nor a FixedMask."""
        p = getattr(self, "p", None)
        return not callable(p) or type(p).__name__ in _SCHEDULES


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ in _SCHEDULES:
        return {"schedule": type(value).__name__, **{field.name: getattr(value, field.name) for field in fields(value)}}
    if callable(value):
        # An object that can be called has only its class's name.
        return {
            "schedule": "callable",
            "name": f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}",
        }
    return value


def from_json(text: str) -> Policy:
    """Rebuilds a policy from its canonical string.

    Raises:
        ValueError: an unknown policy, or one that a string cannot hold (a callable p, a FixedMask):
            pass the same one as ``mask=`` instead.
    """
    try:
        values = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is not a mask policy; pass an object such as GradDrop(p=0.2)") from error
    name = values.pop("policy", None)
    if name not in POLICIES:
        raise ValueError(f"unknown mask policy {name!r}; known are {', '.join(POLICIES)}")
    schedule: Any = values.get("p")
    if name == "FixedMask" or isinstance(schedule, dict) and schedule.get("schedule") == "callable":
        what = "a FixedMask" if name == "FixedMask" else f"the callable p {schedule.get('name')!r}"
        raise ValueError(
            f"{what} is not stored in a state dict; construct the optimizer with the same mask= before loading"
        )
    try:
        if isinstance(schedule, dict):
            schedule = dict(schedule)
            values["p"] = _SCHEDULES[schedule.pop("schedule", None)](**schedule)
        return POLICIES[name](**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{text!r} is not a mask policy of this version: {error}") from error


def _check_p(p: Schedule) -> Schedule:
    value = p if callable(p) else float(p) if isinstance(p, int) and not isinstance(p, bool) else p
    quantize(drop_probability(value, 0))
    return value


def _check_every(policy: Policy, every: str) -> None:
    if every not in ("step", "epoch"):
        raise ValueError(f"{type(policy).__name__}(every=) must be 'step' or 'epoch', got {every!r}")


def _check_layers(policy: Policy, layers: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    if not layers or not all(isinstance(pattern, str) for pattern in layers):
        raise ValueError(
            f"{type(policy).__name__}(layers=) must be block name patterns such as 'encoder.layer.*', got {layers!r}"
        )
    return layers


def _freeze_values(policy: Policy, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(policy, name, value)


@dataclass(frozen=True)
class GradDrop(Policy):
    """Drops each gradient element with probability p and multiplies the others by 1/(1-p) (Eq. 4).

    Args:
        p: drop probability in [0, 1), or a schedule epoch -> p (Anneal-GradDrop: ``LinearAnneal(epochs=T)``).
            Quantised to 2^-16. p = 0 draws nothing.
        every: ``"step"`` redraws at every step, ``"epoch"`` at every epoch, with replacement (III-B, first form).

    Raises:
        ValueError: p outside of [0, 1), or one that rounds to 0 or 1 without being it; another ``every``.
    """

    p: Schedule = 0.2
    every: str = "step"

    def __post_init__(self) -> None:
        _freeze_values(self, p=_check_p(self.p))
        _check_every(self, self.every)

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        clock = context.clock
        threshold = quantize(drop_probability(self.p, clock.epoch))
        age_rate = self._age_rate(clock) if context.frozen and context.count_active_steps else 1.0
        if threshold == 0:
            return replace(KEEP, age_rate=age_rate)
        draw = clock.epoch if self.every == "epoch" else None
        return MaskPlan("bernoulli", context.frozen, threshold, 65536 / (65536 - threshold), draw, age_rate=age_rate)

    def counts_steps(self, frozen: bool) -> bool:
        return frozen

    def _age_rate(self, clock: Clock) -> float:
        """The expected share of the past steps in which an element that is active now was active.

        A frozen element's true age under random masks is random and would cost a counter an element;
        its expectation costs one number a group.
        """
        if clock.completed_steps == 0:
            return 1.0
        keep = {epoch: 1 - quantize(drop_probability(self.p, epoch)) / 65536 for epoch in clock.steps_by_epoch()}
        if self.every == "epoch":
            keep[clock.epoch] = 1.0  # the same mask as now
        return sum(keep[epoch] * steps for epoch, steps in clock.steps_by_epoch().items()) / clock.completed_steps


@dataclass(frozen=True)
class GaussianGradDrop(Policy):
    """Multiplies each gradient element by a fresh N(1, p/(1-p)):
    Gaussian dropout of the same mean and variance as GradDrop's mask (III-A).

    Args:
        p: in [0, 1) or a schedule; quantised to 2^-16. Nothing is dropped, so ``masked=`` does not apply.

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


class BlockPolicy(Policy):
    """A policy that keeps or drops whole transformer blocks: the unit is the block's name,
    None for parameters outside all blocks.
    """

    needs_blocks = True

    def unit(self, name: str, block: str | None) -> Hashable:
        return block

    def plan(self, context: PlanContext, unit: Any) -> MaskPlan:
        if unit is None:
            return KEEP
        # A frozen block's own step counts do not advance,
        # so by default its bias correction counts the steps in which it was active.
        global_step = 0 if context.count_active_steps or not context.frozen else context.clock.completed_steps + 1
        return MaskPlan("keep" if self.keeps(context, unit) else "off", context.frozen, global_step=global_step)

    def keeps(self, context: PlanContext, block: str) -> bool:
        """Whether the block is trained in this step."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerGradDrop(BlockPolicy):
    """Layer-GradDrop: drops each transformer block's whole gradient with probability p, unscaled (IV-2).

    Args:
        p: drop probability of a block in [0, 1), quantised to 2^-16, or a schedule (Anneal-Layer-GradDrop).
        every: ``"step"`` (IV-2) or ``"epoch"`` (the paper's contribution 2).
        layers: block name patterns (``*`` matches one dotted component) where the groups do not come from
            ``param_groups``.

    Raises:
        ValueError: p outside of [0, 1), or one that rounds to 0 or 1 without being it; another ``every``;
            ``layers`` that are no patterns.
    """

    p: Schedule = 0.2
    every: str = "step"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _freeze_values(self, p=_check_p(self.p), layers=_check_layers(self, self.layers))
        _check_every(self, self.every)

    def keeps(self, context: PlanContext, block: str) -> bool:
        clock = context.clock
        threshold = quantize(drop_probability(self.p, clock.epoch))
        draw = clock.epoch if self.every == "epoch" else clock.completed_steps
        return threshold == 0 or block_uniform16(stream_key(block, context.seed), draw) >= threshold


@dataclass(frozen=True)
class GradFreeze(BlockPolicy):
    """Gradual unfreezing: in epoch e (0 first) ceil(L (e+1) / T) of the L blocks are trained,
    the others frozen (GradFreeze-TopDown, -BottomUp; V-A).

    Args:
        epochs: training epochs T >= 1; after them every block is trained.
        direction: ``"top_down"`` begins with the last block, ``"bottom_up"`` with the first.
        blocks_per_epoch: unfreeze this many (at least 1) an epoch instead (the paper's figure 2 has 2 of 24).
        layers: as in LayerGradDrop.

    Raises:
        ValueError: ``epochs`` is missing, or a number is below 1; another direction; ``layers`` that are no patterns.
    """

    epochs: int = None  # type: ignore[assignment]  # left out, it is refused with a message that says what it is
    direction: str = "top_down"
    blocks_per_epoch: int | None = None
    layers: tuple[str, ...] | None = None
    masked = "frozen"
    follows_epochs = True

    def __post_init__(self) -> None:
        require_epochs("GradFreeze(epochs=)", self.epochs)
        if self.direction not in ("top_down", "bottom_up"):
            raise ValueError(f"GradFreeze(direction=) must be 'top_down' or 'bottom_up', got {self.direction!r}")
        if self.blocks_per_epoch is not None:
            require_epochs("GradFreeze(blocks_per_epoch=)", self.blocks_per_epoch)
        _freeze_values(self, layers=_check_layers(self, self.layers))

    def keeps(self, context: PlanContext, block: str) -> bool:
        blocks, epoch = context.blocks, context.clock.epoch
        if self.blocks_per_epoch is None:
            active = -(-len(blocks) * (epoch + 1) // self.epochs)
        else:
            active = self.blocks_per_epoch * (epoch + 1)
        depth = blocks.index(block)
        return depth >= len(blocks) - active if self.direction == "top_down" else depth < active


@dataclass(frozen=True)
class GradDropEpoch(Policy):
    """GradDrop-Epoch: every element draws one of T buckets once;
    epoch e trains the elements of buckets 0..e, the others are frozen (III-B, figure 1).

    Args:
        epochs: training epochs T, 1 to 4096; in the last one every element is trained. Later epochs stay there.
        toggle: train bucket e only, so that every element is trained in exactly one epoch (GradDrop-Epoch-Toggle).
        storage: ``"recompute"`` redraws the bucket in the kernel and stores nothing; ``"bitpacked"`` keeps it as
            ceil(log2 T) bits an element. The training is the same bit for bit.

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

    def after_last_epoch(self, epoch: int) -> str | None:
        if not self.toggle or epoch < self.epochs:
            return None
        # Without the epoch: the same message is shown once.
        return (
            f"training goes on after the last epoch of GradDropEpoch(epochs={self.epochs}, toggle=True): "
            "its last bucket goes on being trained"
        )

    def _ages(self, clock: Clock, first: int, last: int) -> tuple[int, ...]:
        """By bucket: steps in which it was active, this one included; 0 where it is not active now."""
        ages = [0] * first + [1] * (last + 1 - first)
        for epoch, steps in clock.steps_by_epoch().items():
            epoch = min(epoch, self.epochs - 1)
            for bucket in range(max(first, epoch if self.toggle else 0), min(last, epoch) + 1):
                ages[bucket] += steps
        return tuple(ages)


class FixedMask(Policy):
    """Trains only given elements, for ever: any sparse fine-tuning mask (beyond the paper).

    Args:
        masks: {parameter name: bool tensor of the parameter's shape}, True where trained. Parameters without an entry
            are trained densely. Kept as 1 bit an element.
        scale: factor on the kept gradients, finite and > 0.

    Raises:
        ValueError: no masks, one that is no bool tensor, or ``scale`` out of range. Names and shapes are compared with
            the parameters when the optimizer is made.

    A state dict holds a digest of the masks, not the masks: construct with the same ones to resume.
    """

    masked = "frozen"
    rebuildable = False
    follows_epochs = False

    def __init__(self, masks: Mapping[str, torch.Tensor], scale: float = 1.0):
        if not isinstance(masks, Mapping) or not masks:
            raise ValueError(
                f"FixedMask(masks=) must be a non-empty mapping from parameter names to bool tensors, got {masks!r}"
            )
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"FixedMask(scale=) must be a finite number > 0, got {scale!r}")
        for name, mask in masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(
                    f"FixedMask: the mask of {name!r} must be a bool tensor, got {got}; try (weights != 0)"
                )
        self.scale = float(scale)
        self.shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        self.words = {name: bitmask.pack(mask.detach().cpu()) for name, mask in masks.items()}
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.words):
            digest.update(f"{name}{self.shapes[name]}".encode() + self.words[name].numpy().tobytes())
        self.digest = digest.hexdigest()

    def unit(self, name: str, block: str | None) -> Hashable:
        return name in self.words

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        return MaskPlan("fixed", context.frozen, scale=self.scale) if unit else KEEP

    def _values(self) -> dict[str, Any]:
        return {"scale": self.scale, "digest": self.digest}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedMask) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"FixedMask({len(self.words)} masks, scale={self.scale})"


POLICIES = {
    cls.__name__: cls for cls in (GradDrop, GaussianGradDrop, LayerGradDrop, GradDropEpoch, GradFreeze, FixedMask)
}
