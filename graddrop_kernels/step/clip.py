"""Gradient clipping by the global norm inside the step: the gradients are read once more for it, and not written."""


import torch

from ..backends import Backend
from ..backends.batch import TensorBatch

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


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
