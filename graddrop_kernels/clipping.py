"""Gradient clipping by the global norm inside the step: the gradients are read once more for it, and not written."""

import math

import torch

from .backends import Backend
from .multi_tensor import TensorBatch

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def check_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """Raises ValueError for one that cannot be used. Written so that NaN fails it."""
    if max_grad_norm is None:
        return None
    if isinstance(max_grad_norm, (bool, str)) or not 0 < max_grad_norm <= math.inf:
        raise ValueError(f"max_grad_norm must be a number > 0, or None for no clipping, got {max_grad_norm!r}")
    return max_grad_norm


def clip_(
    batches: list[TensorBatch],
    chosen: list[Backend],
    max_grad_norm: float,
    after_mask: bool,
    grad_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Gives every batch the factor by which its backend multiplies the gradients; returns their norm.

    Args:
        chosen: the backend of each batch.
        after_mask: norm of the masked gradients.
        grad_scale: the gradients are this much too large.

    Returns:
        0-d tensor on the first batch's device, float32, or float64 beside float64 parameters. Nothing waits for it.
    """
    device = batches[0].device
    wide = any(batch.param_dtype in (torch.float64, torch.complex128) for batch in batches)
    squares = []
    for backend, batch in zip(chosen, batches):
        square = backend.sum_of_squares(batch, after_mask)
        for group in batch.sharded_over:
            torch.distributed.all_reduce(square, group=group)
        squares.append(square.to(device, non_blocking=True))
    total = squares[0] if len(squares) == 1 else torch.stack(squares).sum()
    norm = total.sqrt()
    if grad_scale is not None:
        norm = norm / grad_scale.to(device, non_blocking=True)
    norm = norm.to(torch.float64 if wide else torch.float32)
    factor = (max_grad_norm / (norm + _EPS)).clamp(max=1.0)
    for batch in batches:
        dtype = torch.float64 if batch.param_dtype in (torch.float64, torch.complex128) else torch.float32
        batch.clip_factor = factor.to(batch.device, dtype, non_blocking=True)
    return norm
