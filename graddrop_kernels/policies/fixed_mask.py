"""FixedMask: masks that the user gives."""

import hashlib
import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ..masks import bitmask
from ..masks.names import canonical_name
from ..masks.plan import MaskPlan
from .clock import PlanContext
from .policy import KEEP, Policy


class FixedMask(Policy):
    """Trains only the given elements, in every step. For any sparse fine-tuning mask (beyond the paper).

    Args:
        masks: {parameter name: bool tensor of the parameter's shape}, True where trained. Parameters without an entry
            are trained densely. The masks are kept as 1 bit per element. Names of a wrapped or compiled model
            (``module.``, ``_orig_mod.``) are taken too.
        scale: factor on the kept gradients, finite and > 0.

    Raises:
        ValueError: no masks, one that is no bool tensor, or ``scale`` out of range. Names and shapes are compared with
            the parameters when the optimizer is made.

    A state dict holds a digest of the masks, not the masks. To resume, construct the policy with the same ones.
    """

    masked = "frozen"
    follows_epochs = False
    draws = None

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
        if len(set(map(canonical_name, masks))) < len(masks):
            raise ValueError("FixedMask(masks=) names a parameter twice, with and without a wrapper's name: leave one")
        masks = {canonical_name(name): mask for name, mask in masks.items()}
        self.shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        self.words = {name: bitmask.pack(mask.detach().cpu()) for name, mask in masks.items()}
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.words):
            digest.update(f"{name}{self.shapes[name]}".encode() + self.words[name].numpy().tobytes())
        self.digest = digest.hexdigest()

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shapes[name] != shape:
            raise ValueError(
                f"FixedMask: the mask of {name!r} has shape {self.shapes[name]}, but the parameter has {shape}"
            )

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
