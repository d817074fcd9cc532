"""Clips gradients by their global norm inside the step. Reads the gradients once more, and does not write them."""

import torch

from .prepared import Part

_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def clip_(
    parts: list[Part], max_grad_norm: float, after_mask: bool, grad_scale: torch.Tensor | None
) -> torch.Tensor:
    """Sets every batch's ``clip_factor``, by which its backend multiplies the gradients, and returns their norm.

    Args:
        after_mask: whether the norm is that of the masked gradients.
        grad_scale: the loss scale that the gradients still contain.

    Returns:
        A 0-d tensor on the first batch's device, float32, or float64 beside float64 parameters. Nothing waits for it.
    """
    batches = [part.batch for part in parts]
    device = batches[0].device
    wide = any(batch.param_dtype in (torch.float64, torch.complex128) for batch in batches)
    squares = []
    for part, batch in zip(parts, batches):
        square = part.backend.sum_of_squares(batch, after_mask)
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
