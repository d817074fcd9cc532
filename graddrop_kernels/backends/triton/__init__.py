"""The triton backend: CUDA and ROCm tensors; CPU tensors in the interpreter.

Its kernels need triton, and are imported at the first call.
"""

import torch

from ...masks.plan import MaskPlan
from ...masks.row_block import RowBlock
from ..batch import TensorBatch
from .probe import DEVICES, interpreted, unavailable

__all__ = [
    "DEVICES", "bucket_planes", "interpreted", "keep_mask", "mask_gradients_", "masked_adamw_", "sum_of_squares",
    "unavailable",
]  # fmt: skip


def masked_adamw_(batch: TensorBatch) -> None:
    """See update.py."""
    from . import kernels

    kernels.update.masked_adamw_(batch)


def sum_of_squares(batch: TensorBatch, masked: bool) -> torch.Tensor:
    """See norm.py."""
    from . import kernels

    return kernels.norm.sum_of_squares(batch, masked)


def mask_gradients_(batch: TensorBatch) -> None:
    """See mask_gradients.py."""
    from . import kernels

    kernels.mask_gradients.mask_gradients_(batch)


def keep_mask(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, mask_words: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """See masks.py."""
    from . import kernels

    return kernels.masks.keep_mask(plan, key, completed_steps, layout, numel, mask_words, device)


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device: torch.device) -> torch.Tensor:
    """See masks.py."""
    from . import kernels

    return kernels.masks.bucket_planes(key, buckets, layout, numel, device)
