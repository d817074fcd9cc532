"""Checks of the gradients of one step, made before any of them is masked."""

import weakref
from operator import attrgetter
from typing import Any

import torch

from ..backends import capture
from ..tensors.local import any_nonzero, local_grads

_layout, _device, _dtype = attrgetter("layout"), attrgetter("device"), attrgetter("dtype")
Masked = list[tuple["weakref.ref[torch.Tensor]", int]]  # gradients that a step has masked, and their versions then


def check_step(optimizer: torch.optim.Optimizer, grads: list[torch.Tensor], masked: Masked) -> None:
    """Raises RuntimeError for a step that cannot be masked from outside.

    Args:
        masked: what the step before has masked.
    """
    if any(map(capture.capturing, set(map(_device, grads)))):
        raise RuntimeError(
            "a CUDA graph is being captured, whose replays run no hooks, so that all would have the mask of this "
            "step: call step() outside of the graph, or use FusedGradDropAdamW, whose step can be captured"
        )
    if getattr(optimizer, "grad_scale", None) is not None and torch.float16 in map(_dtype, grads):
        raise RuntimeError(
            "a GradScaler leaves these float16 gradients scaled until the step, where the mask's own scale could "
            "make them infinite: call scaler.unscale_(optimizer) before scaler.step(optimizer), or make the "
            "optimizer with fused=False"
        )
    unchanged = {id(grad) for ref, version in masked if (grad := ref()) is not None and grad._version == version}
    if unchanged and not unchanged.isdisjoint(map(id, grads)):
        raise RuntimeError(
            "a gradient was masked already, by a step() before, and has not been computed anew since: call "
            "zero_grad(), then run forward, backward and step()"
        )


def check_grads(grads: list[torch.Tensor]) -> None:
    """Raises RuntimeError or ValueError for local gradients that cannot be masked in place."""
    if other := set(map(_layout, grads)) - {torch.strided}:
        raise RuntimeError(
            f"a gradient is sparse ({other.pop()}), and attach_mask needs dense gradients: use sparse=False in the "
            "embedding, or leave its parameter to another optimizer"
        )
    if len(set(map(torch.Tensor.data_ptr, grads))) < len(grads):  # of empty ones it is 0
        addresses = [grad.data_ptr() for grad in grads if grad.numel()]
        if len(set(addresses)) < len(addresses):
            raise ValueError(
                "two parameters have the same tensor for a gradient, which two masks would act on: give each its own "
                "(param.grad = param.grad.clone())"
            )


def is_state_probe(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], grads: list[torch.Tensor | None]
) -> bool:
    """Whether a step only asks for the state, as torch.distributed.checkpoint does: it is the first, and lr and
    gradients are 0.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    if optimizer.state or any(any(group["param_steps"]) for group in groups):
        return False
    if not all("lr" in group and group["lr"] is not None and float(group["lr"]) == 0 for group in groups):
        return False
    found = [(param, grad) for param, grad in zip(params, grads) if grad is not None]
    local = local_grads([param for param, _ in found], [grad for _, grad in found])
    return bool(local) and not any_nonzero(params, local)
