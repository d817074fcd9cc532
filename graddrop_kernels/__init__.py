"""GradDrop, masked fine-tuning of transformers, inside one fused AdamW step. See README.md."""

from .attached.handle import attach_mask
from .backends import available_backends
from .groups.blocks import find_blocks
from .groups.param_groups import param_groups
from .inspection.describe import describe
from .inspection.mask_plot import plot_mask
from .inspection.memory import memory
from .inspection.schedule_plot import plot_schedule
from .integrations.deepspeed import attach_deepspeed
from .integrations.fsdp1 import attach_fsdp1
from .integrations.new_tokens import new_token_rows
from .integrations.zero_redundancy import attach_zero
from .optimizer import FusedGradDropAdamW
from .policies import (
    CycleBlocks,
    FixedMask,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    RandomMask,
    SampleBlocks,
    SkipUpdate,
    TrainRows,
)
from .policies.mask_builders import top_change, top_gradient, top_magnitude
from .policies.schedules import ExponentialAnneal, LinearAnneal

__version__ = "0.1.0"
__all__ = [
    "CycleBlocks",
    "ExponentialAnneal",
    "FixedMask",
    "FusedGradDropAdamW",
    "GaussianGradDrop",
    "GradDrop",
    "GradDropEpoch",
    "GradFreeze",
    "LayerGradDrop",
    "LinearAnneal",
    "RandomMask",
    "SampleBlocks",
    "SkipUpdate",
    "TrainRows",
    "attach_deepspeed",
    "attach_fsdp1",
    "attach_mask",
    "attach_zero",
    "available_backends",
    "describe",
    "find_blocks",
    "memory",
    "new_token_rows",
    "param_groups",
    "plot_mask",
    "plot_schedule",
    "top_change",
    "top_gradient",
    "top_magnitude",
]
