"""Flat buffers of engines: which parameters lie where in them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn


def flat_buffer_reason(tensor: torch.Tensor, given: bool = True) -> str | None:
    """Why a tensor without pieces must not be stepped: it is a flat buffer, and a mask drawn for it would depend on the
    sharding. None: it is none.

    ``given``: whether the optimizer was given this tensor when it was made or got the group; False for one that has
    come into the group since, as DeepSpeed's partitions do.
    """
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "it is (a slice of) a flat parameter of FSDP1: call graddrop_kernels.attach_fsdp1(optimizer, model)"
    if not given and tensor.dim() == 1 and not isinstance(tensor, nn.Parameter) and not hasattr(tensor, "placements"):
        return (
            "something has put this flat tensor in the place of the parameters: if it was DeepSpeed (ZeRO 1, 2 or 3), "
            "call graddrop_kernels.attach_deepspeed(engine) after deepspeed.initialize(); otherwise tell what it holds "
            "with optimizer.attach_pieces()"
        )
    return None


class FlatPiece(NamedTuple):
    """A contiguous range of a flat buffer that belongs to one parameter."""

    name: str  # the parameter's, as in model.named_parameters()
    local_start: int  # its first element in the buffer
    global_start: int  # the same element in the whole parameter, in contiguous order
    numel: int


Flat = Mapping[torch.Tensor, Sequence[FlatPiece]]  # what was attached to the flat buffers among the parameters


def check_pieces(buffer: torch.Tensor, pieces: Sequence[FlatPiece]) -> None:
    """Raises ValueError for pieces that overlap, or are not in the buffer."""
    end = 0
    for piece in map(FlatPiece._make, pieces):
        if not end <= piece.local_start <= piece.local_start + piece.numel <= buffer.numel() or piece.global_start < 0:
            raise ValueError(
                f"{piece} does not fit into a flat buffer of {buffer.numel()} elements of which the first {end} are "
                "taken: pieces are given in order and do not overlap"
            )
        end = piece.local_start + piece.numel
