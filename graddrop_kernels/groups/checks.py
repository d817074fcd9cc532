"""What is refused before anything has changed: parameters, gradients, masks that no step could use."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stub

from ..policies import FixedMask
from ..tensors.memory import overlaps_itself
from .records import ParamRecord

if TYPE_CHECKING:
    from ..optimizer import FusedGradDropAdamW


def check_fixed_mask(policy: FixedMask, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raises ValueError unless every mask has a parameter of its name and shape (None: in a flat buffer)."""
    for name, shape in policy.shapes.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=3, cutoff=0.0)
            raise ValueError(f"FixedMask: no parameter is called {name!r}; near names are {', '.join(map(repr, near))}")
        if shapes[name] not in (None, shape):
            raise ValueError(f"FixedMask: the mask of {name!r} has shape {shape}, but the parameter has {shapes[name]}")


def check_param(name: str, param: torch.Tensor) -> None:
    """Raises ValueError or TypeError for a parameter that no backend can step."""
    if isinstance(param, UninitializedTensorMixin):
        return  # of a lazy module: checked again before its first step
    if not param.is_floating_point() and param.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; "
            "float32, float64, bfloat16, float16, complex64 and complex128 are supported"
        )
    if not param.is_contiguous() and overlaps_itself(param):
        raise ValueError(
            f"parameter {name!r} has overlapping memory (shape {tuple(param.shape)}, strides {param.stride()}), "
            "as after expand(): several of its elements would be stepped in one place; "
            "give the optimizer a copy (.clone() or .contiguous())"
        )


def check_grad(name: str, param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raises RuntimeError or ValueError for a gradient that does not belong to its parameter."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({grad.layout}): FusedGradDropAdamW needs dense gradients; "
            "use sparse=False in the embedding"
        )
    if grad.shape != param.shape or grad.dtype != param.dtype or grad.device != param.device:
        raise ValueError(
            f"the gradient of {name!r} is {tuple(grad.shape)} {grad.dtype} on {grad.device}, its parameter "
            f"{tuple(param.shape)} {param.dtype} on {param.device}; they must be alike"
        )


def check_flat(optimizer: "FusedGradDropAdamW", record: ParamRecord, param: torch.Tensor) -> None:
    """Raises TypeError for a flat buffer of which nobody said what is in it, ValueError for an option that needs more
    of one than is here.
    """
    if reason := optimizer._groups.flat_buffer_reason(param):
        raise TypeError(
            f"parameter {record.name!r} is a flat buffer of a wrapper, and a mask drawn for it would depend on the "
            f"sharding: {reason}"
        )
    if record.flat and optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={optimizer.max_grad_norm!r} cannot be used with the flat buffer {record.name!r}, whose "
            "other parts are not known here: set it to None and clip with the engine's own method"
        )


def check_written_grads(optimizer: "FusedGradDropAdamW", params: list[Any], grads: list[torch.Tensor | None]) -> None:
    """Raises ValueError for a gradient that cannot be unscaled in place."""
    for param, grad in zip(params, grads):
        if grad is not None and not grad.is_contiguous() and overlaps_itself(grad):
            index, position = optimizer._groups.find(param)
            raise ValueError(
                f"the gradient of {optimizer._groups.records(index)[position].name!r} has overlapping memory, as after "
                "expand(): it cannot be unscaled in place; give param.grad a copy (.clone())"
            )
