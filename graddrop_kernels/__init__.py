"""GradDrop, masked fine-tuning of transformers, inside one fused AdamW step. See README.md."""

from .attach import attach_deepspeed, attach_fsdp1, attach_zero
from .backends import available_backends
from .blocks import find_blocks
from .groups import param_groups
from .inspection import describe
from .mask_plot import plot_mask
from .optimizer import FusedGradDropAdamW
from .policies import FixedMask, GaussianGradDrop, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop
from .schedule_plot import plot_schedule
from .schedules import ExponentialAnneal, LinearAnneal

__version__ = "0.1.0"
__all__ = [
    "ExponentialAnneal",
    "FixedMask",
    "FusedGradDropAdamW",
    "GaussianGradDrop",
    "GradDrop",
    "GradDropEpoch",
    "GradFreeze",
    "LayerGradDrop",
    "LinearAnneal",
    "attach_deepspeed",
    "attach_fsdp1",
    "attach_zero",
    "available_backends",
    "describe",
    "find_blocks",
    "param_groups",
    "plot_mask",
    "plot_schedule",
]
