"""Shared parts of the attach_...() functions. Each of these describes to an optimizer which elements of which
parameters an engine's tensors hold, so that masks stay those of the whole parameters.

DistributedDataParallel and FSDP2 need none of this: their tensors carry this information themselves.
"""

from typing import Any

import torch
from torch import nn

from ..attached.handle import attached_to
from ..groups.flat_buffers import FlatPiece
from ..groups.masking import masking_of
from ..groups.names import canonical_name

Pieces = dict[torch.Tensor, list[FlatPiece]]


def require(optimizer: Any, function: str, what: str) -> Any:
    """Returns what masks: the optimizer, or the mask that is attached to it. Raises TypeError if there is neither,
    ValueError if it clips: no process has all gradients.
    """
    if (attached := attached_to(optimizer)) is not None:
        return attached
    try:
        masking_of(function, optimizer)
    except TypeError:
        raise TypeError(f"{function} needs {what}, got {type(optimizer).__name__}") from None
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm!r} would clip by the norm of this process's part of the "
            "gradients: set it to None and let the engine clip"
        )
    return optimizer


def names_of(model: nn.Module) -> dict[int, str]:
    """Returns {id of a parameter: its canonical name}."""
    return {id(param): canonical_name(name) for name, param in model.named_parameters()}


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
