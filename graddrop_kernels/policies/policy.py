"""Mask policies say what is dropped. There is one class per row of the paper (O'Neill & Dutta, "Gradient
Sparsification For Masked Fine-Tuning of Transformers").

A policy is an immutable value. It turns a PlanContext into a MaskPlan for each of its units (the whole group, or a
block). It knows no tensors, except that FixedMask has its own. ``masked`` says what dropping means by default. With
``"gradient"`` the gradient is 0, so that moments decay and the weight still moves by momentum and weight decay. With
``"frozen"`` parameter and moments stay as they are, bit for bit. With ``"update"`` the parameter does, and the moments
see the whole gradient.
"""

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from ..masks.plan import MaskPlan
from .clock import History, PlanContext
from .rows import Rows
from .schedules import ExponentialAnneal, LinearAnneal, Schedule, drop_probability, quantize

KEEP = MaskPlan("keep")
KEPT_EPOCHS = 32  # of a history; older ones are folded
_SCHEDULES = {cls.__name__: cls for cls in (LinearAnneal, ExponentialAnneal)}


class Policy:
    """Base of the policies: the JSON form, and the defaults that element policies share."""

    masked: str | None = "gradient"
    takes_any_masked = True  # whether ``masked=`` may be another
    needs_blocks = False
    layers: tuple[str, ...] | None = None
    takes_turns = False  # whether all groups of the policy go by the count of the one that has made most steps
    # What its plans draw for single elements: "bits" (kept or not, or a bucket), "numbers" (anything), or None.
    draws: str | None = "numbers"

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        """The plan of one step for one ``unit``, which is a value that ``unit()`` returns."""
        raise NotImplementedError

    def unit(self, name: str, block: str | None) -> Hashable:
        """The unit of a parameter. Parameters of one unit share a plan."""
        return None

    @property
    def named(self) -> tuple[str, ...]:
        """The canonical names of the parameters that it names."""
        return ()

    def rows_of(self, name: str) -> Rows | None:
        """The rows of a parameter that are trained; None: the plan says what is."""
        return None

    @property
    def follows_epochs(self) -> bool:
        """Whether ``set_epoch`` changes anything."""
        return callable(getattr(self, "p", None)) or getattr(self, "every", None) == "epoch"

    def counts_steps(self, frozen: bool) -> bool:
        """Whether plans depend on how many steps the group has completed."""
        return True

    def kept_draws(self, epoch: int) -> int:
        """The expected share of elements that a step of an epoch trains, times 2^16. ``fold`` adds it up."""
        return 65536

    def fold(self, history: History, folded: int) -> tuple[History, int]:
        """Shortens a history, so that it does not grow with the training. See Clock for both arguments.

        By default the oldest epochs become a sum of ``kept_draws``, as they were under this policy. A policy that needs
        more of them returns what it needs.
        """
        while len(history) > KEPT_EPOCHS:
            (epoch, start), (_, end) = history[:2]
            history, folded = history[1:], folded + self.kept_draws(epoch) * (end - start)
        return history, folded

    def check_epoch(self, epoch: int) -> None:
        """Raises ValueError when a schedule has no usable p at this epoch."""
        p = getattr(self, "p", None)
        if callable(p):
            quantize(drop_probability(p, epoch))

    def check_blocks(self, blocks: Sequence[str]) -> None:
        """Raises ValueError if the policy cannot work with these blocks, which are all that are trained."""

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if a parameter that the policy names has another shape than it can work with."""

    def after_last_epoch(self, epoch: int) -> str | None:
        """The warning to give when training goes on to this epoch, or None."""
        return None

    def to_json(self) -> str:
        """The policy as one canonical string. Equal policies give equal strings."""
        return json.dumps({"policy": type(self).__name__, **self._values()}, sort_keys=True, separators=(",", ":"))

    def _values(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]  # dataclasses all


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ in _SCHEDULES:
        return {"schedule": type(value).__name__, **{field.name: getattr(value, field.name) for field in fields(value)}}
    if callable(value):
        # A callable object has no name but its class's.
        return {
            "schedule": "callable",
            "name": f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}",
        }
    return value


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


class BlockPolicy(Policy):
    """A policy that keeps or drops whole transformer blocks. The unit is the block's name, and None for parameters
    outside of all blocks.
    """

    needs_blocks = True
    draws = None

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
