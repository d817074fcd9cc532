"""Engines that flatten or deal out parameters: each attach_...() tells an optimizer which elements of which parameters
its tensors hold, so that masks stay those of the whole parameters.

DistributedDataParallel and FSDP2 need none of this: their tensors say it themselves.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..groups.flat_buffers import FlatPiece
from ..groups.masking import require_optimizer
from ..groups.names import canonical_name

if TYPE_CHECKING:

    pass

Pieces = dict[torch.Tensor, list[FlatPiece]]


def _require(optimizer: Any, function: str, what: str) -> None:
    try:
        require_optimizer(function, optimizer)
    except TypeError:
        raise TypeError(f"{function} needs {what}, got {type(optimizer).__name__}") from None
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm!r} would clip by the norm of this process's part of the "
            "gradients: set it to None and let the engine clip"
        )


def _names(model: nn.Module) -> dict[int, str]:
    return {id(param): canonical_name(name) for name, param in model.named_parameters()}


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
