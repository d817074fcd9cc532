"""GradDrop, masked fine-tuning of transformers, inside one fused AdamW step. See README.md."""

from .backends import available_backends
from .blocks import find_blocks
from .groups import param_groups
from .optimizer import FusedGradDropAdamW
from .policies import FixedMask, GaussianGradDrop, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop
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
    "available_backends",
    "find_blocks",
    "param_groups",
]
