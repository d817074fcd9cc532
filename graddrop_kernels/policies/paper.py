"""The paper's methods, one row each, then those beyond the paper. The demo, `bench`, `verify`, the benchmarks, the
study and the tests read them.

FixedMask cannot be a row, since it needs tensors. Readers that step it add it themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .blocks import GradFreeze, LayerGradDrop
from .elements import GaussianGradDrop, GradDrop, GradDropEpoch, RandomMask
from .policy import Policy
from .schedules import LinearAnneal, Schedule
from .skip_update import SkipUpdate
from .turns import CycleBlocks, SampleBlocks


@dataclass(frozen=True)
class Method:
    """A row of METHODS. Call it to make the policy.

    Args:
        title: the paper's name for it.
        name: its name in `verify` and in the benchmarks, by which results are stored.
        make: (epochs, p) -> policy, None for plain AdamW.
        anneals: whether p follows a LinearAnneal instead of the p given.
        studied: whether the demo and the study of transfer train with it.
        timed: whether the benchmarks time it. A step of any other method costs as much as that of a timed one.
    """

    title: str
    name: str
    make: Callable[[int, Schedule], Policy | None]
    anneals: bool = False
    studied: bool = True
    timed: bool = True

    def __call__(
        self, epochs: int, p: Schedule = 0.2, anneal: LinearAnneal | None = None, layers: tuple[str, ...] | None = None
    ) -> Policy | None:
        """The policy. ``anneal``: the schedule, if it anneals. ``layers``: those of a policy of blocks."""
        policy = self.make(epochs, (anneal or LinearAnneal(epochs)) if self.anneals else p)
        if layers is None or policy is None or not policy.needs_blocks:
            return policy
        return replace(policy, layers=layers)  # type: ignore[type-var]  # dataclasses all

    @property
    def needs_blocks(self) -> bool:
        """Whether it masks whole blocks."""
        return getattr(self(1), "needs_blocks", False)

    @property
    def masked(self) -> str | None:
        """The default meaning of dropping; None if nothing is dropped."""
        return getattr(self(1), "masked", None)


# Keyed by their names on command lines and in files of results. The first eight are the rows of the paper's tables, in
# their order. The others are methods that the paper describes or names besides.
METHODS = {
    "sft": Method("SFT", "mask=None", lambda epochs, p: None),
    "gradfreeze-topdown": Method("GradFreeze-TopDown", "GradFreeze, top down", lambda epochs, p: GradFreeze(epochs)),
    "gradfreeze-bottomup": Method(
        "GradFreeze-BottomUp", "GradFreeze, bottom up", lambda epochs, p: GradFreeze(epochs, "bottom_up"), timed=False
    ),
    "graddrop": Method("GradDrop", "GradDrop", lambda epochs, p: GradDrop(p)),
    "anneal-graddrop": Method(
        "Anneal-GradDrop", "GradDrop, annealed", lambda epochs, p: GradDrop(p), anneals=True, timed=False
    ),
    "anneal-layer-graddrop": Method(
        "Anneal-Layer-GradDrop", "LayerGradDrop, annealed", lambda epochs, p: LayerGradDrop(p), anneals=True,
        timed=False,
    ),
    "layer-graddrop": Method("Layer-GradDrop", "LayerGradDrop", lambda epochs, p: LayerGradDrop(p)),
    "graddrop-epoch": Method("GradDrop-Epoch", "GradDropEpoch", lambda epochs, p: GradDropEpoch(epochs)),
    "graddrop-epoch-toggle": Method(
        "GradDrop-Epoch-Toggle", "GradDropEpoch, toggle", lambda epochs, p: GradDropEpoch(epochs, toggle=True)
    ),
    "graddrop-redrawn-each-epoch": Method(
        "GradDrop, redrawn each epoch", "GradDrop, every epoch", lambda epochs, p: GradDrop(p, every="epoch")
    ),
    "gaussian-graddrop": Method("Gaussian GradDrop", "GaussianGradDrop", lambda epochs, p: GaussianGradDrop(p)),
    "layer-graddrop-redrawn-each-epoch": Method(
        "Layer-GradDrop, redrawn each epoch", "LayerGradDrop, every epoch",
        lambda epochs, p: LayerGradDrop(p, every="epoch"), studied=False, timed=False,
    ),
    "graddrop-epoch-bitpacked": Method(
        "GradDrop-Epoch, bit-packed", "GradDropEpoch, bit-packed",
        lambda epochs, p: GradDropEpoch(epochs, storage="bitpacked"), studied=False,
    ),
    # Beyond the paper.
    "random-mask": Method("Random mask", "RandomMask", lambda epochs, p: RandomMask(0.05), studied=False),
    "skip-update": Method("Skipped updates", "SkipUpdate", lambda epochs, p: SkipUpdate()),
    "sample-blocks": Method(
        "Sampled blocks", "SampleBlocks", lambda epochs, p: SampleBlocks(k=1, every=2), studied=False, timed=False
    ),
    "cycle-blocks": Method(
        "Blocks in turns", "CycleBlocks", lambda epochs, p: CycleBlocks(every=2), studied=False, timed=False
    ),
}  # fmt: skip
