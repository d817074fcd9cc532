"""Policies decide what is dropped, and when. There is one class per row of the paper.

An extension imports from here: ``from graddrop_kernels.policies import Policy, BlockPolicy, KEEP, MaskPlan, quantize``.
"""

from ..masks.plan import MaskPlan
from .blocks import GradFreeze, LayerGradDrop
from .clock import Clock, PlanContext
from .elements import GaussianGradDrop, GradDrop, GradDropEpoch, RandomMask
from .fixed_mask import FixedMask
from .policy import KEEP, BlockPolicy, Policy
from .registry import POLICIES, PolicyBook, from_json
from .rows import Rows
from .schedules import ExponentialAnneal, LinearAnneal, quantize
from .skip_update import SkipUpdate
from .train_rows import LEFT_OUT, TrainRows
from .turns import CycleBlocks, SampleBlocks

__all__ = [
    "KEEP", "POLICIES", "BlockPolicy", "Clock", "CycleBlocks", "ExponentialAnneal", "FixedMask", "GaussianGradDrop",
    "GradDrop", "GradDropEpoch", "GradFreeze", "LEFT_OUT", "LayerGradDrop", "LinearAnneal", "MaskPlan", "PlanContext",
    "Policy", "PolicyBook", "RandomMask", "Rows", "SampleBlocks", "SkipUpdate", "TrainRows", "from_json", "quantize",
]  # fmt: skip
