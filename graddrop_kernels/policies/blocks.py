"""Policies of whole transformer blocks: LayerGradDrop, GradFreeze."""

from dataclasses import dataclass

from ..masks.philox import block_uniform16, stream_key
from .clock import PlanContext
from .policy import BlockPolicy, _check_every, _check_layers, _check_p, _freeze_values
from .schedules import Schedule, drop_probability, quantize, require_epochs


@dataclass(frozen=True)
class LayerGradDrop(BlockPolicy):
    """Layer-GradDrop: drops each transformer block's whole gradient with probability p, unscaled (IV-2).

    Args:
        p: drop probability of a block in [0, 1), quantised to 2^-16, or a schedule (Anneal-Layer-GradDrop).
        every: ``"step"`` (IV-2) or ``"epoch"`` (the paper's contribution 2).
        layers: block name patterns, for groups that do not come from ``param_groups``. ``*`` matches one dotted
            component.

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
    """Unfreezes blocks gradually: in epoch e (0 first) ceil(L (e+1) / T) of the L blocks are trained, the others frozen
    (GradFreeze-TopDown, -BottomUp; V-A).

    Args:
        epochs: number of training epochs T >= 1. After them every block is trained.
        direction: ``"top_down"`` begins with the last block, ``"bottom_up"`` with the first.
        blocks_per_epoch: unfreezes this many (at least 1) per epoch instead. The paper's figure 2 has 2 of 24.
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
        if block not in blocks:
            return True  # nothing in it was trained when the schedule was made
        if self.blocks_per_epoch is None:
            active = -(-len(blocks) * (epoch + 1) // self.epochs)
        else:
            active = self.blocks_per_epoch * (epoch + 1)
        depth = blocks.index(block)
        return depth >= len(blocks) - active if self.direction == "top_down" else depth < active
