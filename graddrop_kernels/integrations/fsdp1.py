"""FullyShardedDataParallel (FSDP1): describes to the optimizer which elements of which parameters its tensors hold."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..groups.flat_buffers import FlatPiece
from ..groups.names import canonical_name
from .engines import Pieces, require, tensors_of


def attach_fsdp1(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Describes to the optimizer, or to the mask that ``attach_mask`` has put on it, where FullyShardedDataParallel
    (FSDP1) has put the model's parameters, with either value of ``use_orig_params``. For policies of whole blocks each
    block must be a unit of its own (``auto_wrap_policy``), or ``use_orig_params=True``.

    Args:
        optimizer: made from the parameters of the wrapped model: a FusedGradDropAdamW, or any with ``attach_mask``.
        model: the wrapped model, or one that holds wrapped ones.

    Raises:
        TypeError: another optimizer without a mask.
        ValueError: the optimizer has none of the model's flat parameters, or ``max_grad_norm``, as no process has all
            gradients (use the model's ``clip_grad_norm_``).
    """
    what = "a FusedGradDropAdamW, or an optimizer with attach_mask"
    masks = require(optimizer, "attach_fsdp1(optimizer, model)", what)
    pieces = fsdp1_pieces(model)
    stepped = {tensor: pieces[tensor] for tensor in tensors_of(optimizer) if tensor in pieces}
    if not stepped:
        raise ValueError(
            "attach_fsdp1: the optimizer steps none of the model's sharded parameters: "
            "wrap the model first, then make the optimizer from the wrapped model's named_parameters()"
        )
    shapes = {name: shape for names, flat in _fsdp1_units(model) for name, shape in zip(names, flat._shapes)}
    flat_of = {param: flat for _, flat in _fsdp1_units(model) for param in flat._params or ()}
    own = weakref.proxy(optimizer)  # weak, because the optimizer holds the function below

    def has_gradients(index: int) -> bool:
        # A slice without elements in this process has no gradient, but its unit's flat parameter has one.
        params = (param for param in own.param_groups[index]["params"] if param.requires_grad)
        return any(param in flat_of and flat_of[param].grad is not None for param in params)

    masks.attach_pieces(stepped, shapes, has_gradients=has_gradients)


def fsdp1_pieces(model: nn.Module) -> Pieces:
    """Returns what each tensor of an FSDP1 model that an optimizer may step holds in this process."""
    pieces: Pieces = {}
    for names, flat in _fsdp1_units(model):
        ranges = [
            FlatPiece(name, info.offset_in_shard, info.intra_param_start_idx, info.numel_in_shard)
            if info.in_shard
            else None
            for name, info in zip(names, flat._shard_param_infos)
        ]
        if flat._params is None:  # use_orig_params=False
            pieces[flat] = sorted(filter(None, ranges), key=lambda piece: piece.local_start)
            continue
        for param, piece in zip(flat._params, ranges):
            # Each parameter is a slice of the flat one, so its piece begins at its own element 0.
            pieces[param] = [piece._replace(local_start=0)] if piece else []
    return pieces


def _fsdp1_units(model: nn.Module) -> Iterator[tuple[list[str], Any]]:
    """Yields (names of its parameters, its flat parameter) of every FSDP1 unit that has parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for prefix, module in model.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            flat = handle.flat_param
            yield [canonical_name(f"{prefix}.{name}".removeprefix(".")) for name in flat._fqns], flat
