"""Policies that train a few transformer blocks at a time, in turns: SampleBlocks, CycleBlocks (beyond the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..masks.philox import block_uniform64, stream_key
from .clock import PlanContext
from .policy import BlockPolicy, _check_layers, _freeze_values


class _Turns(BlockPolicy):
    """Blocks that take turns of ``every`` steps. All others are frozen."""

    every: int
    idle_state: str
    masked = "frozen"
    takes_turns = True

    def keeps(self, context: PlanContext, block: str) -> bool:
        # A block that is not among them had nothing to train when the groups were made.
        return block not in context.blocks or block in self.active(context)

    def active(self, context: PlanContext) -> Sequence[str]:
        """The blocks whose turn it is."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampleBlocks(_Turns):
    """Trains k of the L blocks at a time, others every N steps; the rest is frozen (LISA, arXiv 2403.17919).

    Embeddings, head and whatever else is outside of the blocks are trained densely.

    Args:
        k: number of blocks, 1 to L.
        every: number of steps N >= 1 until others are drawn.
        layers: as in LayerGradDrop.
        idle_state: what becomes of the moments of blocks without a turn. ``"keep"``: they stay as they are. ``"drop"``:
            they are freed, and a block begins each turn with moments and a step count of 0, as in BAdam's own code.

    Raises:
        ValueError: ``k`` or ``every`` is no int >= 1; another ``idle_state``; ``layers`` that are no patterns; k > L,
            when the optimizer is made.
    """

    k: int
    every: int
    layers: tuple[str, ...] | None = None
    idle_state: str = "keep"

    def __post_init__(self) -> None:
        _require_count("SampleBlocks(k=)", "blocks", self.k)
        _require_count("SampleBlocks(every=)", "steps", self.every)
        _check_idle_state(self)
        _freeze_values(self, layers=_check_layers(self, self.layers))

    def check_blocks(self, blocks: Sequence[str]) -> None:
        if self.k > len(blocks):
            raise ValueError(
                f"SampleBlocks(k={self.k}) trains {self.k} blocks at a time, and the model has {len(blocks)} that are "
                f"trained: give k at most {len(blocks)}"
            )

    def active(self, context: PlanContext) -> Sequence[str]:
        return _shuffled(context.blocks, context.seed, context.clock.completed_steps // self.every)[: self.k]


@dataclass(frozen=True)
class CycleBlocks(_Turns):
    """Trains one block after the other, each for N steps; the rest is frozen (BAdam, arXiv 2404.02827).

    Embeddings, head and whatever else is outside of the blocks are trained densely.

    Args:
        every: number of steps N >= 1 of a turn.
        order: ``"forward"`` from the first block on, ``"backward"`` from the last, ``"random"`` in an order that is
            drawn anew for each round.
        layers, idle_state: as in SampleBlocks.

    Raises:
        ValueError: ``every`` is no int >= 1; another order or ``idle_state``; ``layers`` that are no patterns.
    """

    every: int
    order: str = "forward"
    layers: tuple[str, ...] | None = None
    idle_state: str = "keep"

    def __post_init__(self) -> None:
        _require_count("CycleBlocks(every=)", "steps", self.every)
        if self.order not in ("forward", "backward", "random"):
            raise ValueError(f"CycleBlocks(order=) must be 'forward', 'backward' or 'random', got {self.order!r}")
        _check_idle_state(self)
        _freeze_values(self, layers=_check_layers(self, self.layers))

    def active(self, context: PlanContext) -> Sequence[str]:
        blocks: Sequence[str] = context.blocks
        if not blocks:
            return ()
        round_, turn = divmod(context.clock.completed_steps // self.every, len(blocks))
        if self.order == "random":
            blocks = _shuffled(context.blocks, context.seed, round_)
        return (blocks[-1 - turn] if self.order == "backward" else blocks[turn],)


@lru_cache(maxsize=64)
def _shuffled(blocks: tuple[str, ...], seed: int, draw: int) -> tuple[str, ...]:
    """The blocks in the order of their 64-bit draws. Equal draws go by name."""
    return tuple(sorted(blocks, key=lambda block: (block_uniform64(stream_key(block, seed), draw), block)))


def _require_count(what: str, things: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{what} must be a number of {things}, an int >= 1, got {count!r}")


def _check_idle_state(policy: _Turns) -> None:
    if policy.idle_state not in ("keep", "drop"):
        raise ValueError(f"{type(policy).__name__}(idle_state=) must be 'keep' or 'drop', got {policy.idle_state!r}")
