"""What the optimizer knows of each parameter besides its tensors: its name, its random stream, its block.
And which parameters it must refuse.
"""

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stub

from .memory import overlaps_itself
from .names import block_of, canonical_name, match_layers
from .philox import stream_key
from .policies import FixedMask, Policy


class FlatPiece(NamedTuple):
    """A contiguous range of a flat buffer that belongs to one parameter."""

    name: str  # the parameter's, as in model.named_parameters()
    local_start: int  # its first element in the buffer
    global_start: int  # the same element in the whole parameter, in contiguous order
    numel: int


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """``unit`` is what decides about the parameter together with others (Policy.unit): None, its block's name, ...

    ``flat``: (piece, random stream, unit) of each parameter that is in a flat buffer; empty for a parameter by itself.
    """

    name: str
    key: int
    unit: Hashable
    flat: tuple[tuple[FlatPiece, int, Hashable], ...] = ()


Flat = Mapping[torch.Tensor, Sequence[FlatPiece]]  # what was attached to the flat buffers among the parameters


def group_names(group: dict[str, Any], index: int, flat: Flat) -> list[str]:
    """Canonical names of a group's parameters; "{group}.{position}" for parameters given without names, and where a
    wrapper has put flat buffers in their place.

    Raises:
        ValueError: fewer or more names than parameters, as when a wrapper has flattened them into one buffer.
    """
    names, params = group.get("param_names"), group["params"]
    if names is None or (len(names) != len(params) and all(param in flat for param in params)):
        return [f"{index}.{position}" for position in range(len(params))]
    if len(names) != len(params):
        raise ValueError(
            f"parameter group {index} has {len(params)} tensors but {len(names)} names: a wrapper has "
            "flattened them, and masks drawn for the flat buffer would depend on the sharding; "
            "build the optimizer from the tensors that it will step, or see graddrop_kernels.attach"
        )
    return [canonical_name(name) for name in names]


def _names_of_model(groups: list[dict[str, Any]], flat: Flat) -> list[str]:
    """Canonical names of all parameters in all groups, flat buffers as what is in them."""
    return [
        each
        for index, group in enumerate(groups)
        for param, name in zip(group["params"], group_names(group, index, flat))
        for each in ([canonical_name(piece.name) for piece in flat[param]] if param in flat else [name])
    ]


def group_blocks(
    groups: list[dict[str, Any]], index: int, policy: Policy, flat: Flat
) -> tuple[tuple[str, ...], list[str | None]]:
    """(all blocks in forward order, the block of each parameter of group ``index``), for a policy that needs blocks.

    They come from the policy's ``layers`` patterns, else from what ``param_groups`` has put into the group.

    Raises:
        ValueError: neither is there.
    """
    group = groups[index]
    kind = type(policy).__name__
    names = group_names(group, index, flat)
    if policy.layers is not None:
        if "param_names" not in group and not any(param in flat for param in group["params"]):
            raise ValueError(
                f"{kind}(layers=...) needs parameter names: pass model.named_parameters() instead of model.parameters()"
            )
        blocks = match_layers(policy.layers, _names_of_model(groups, flat))
        return tuple(blocks), [block_of(name, blocks) for name in names]
    if "block" in group:  # param_groups(..., per_block=True): of however many tensors an engine makes of the group
        return tuple(group["blocks"]), [group["block"]] * len(names)
    if "blocks" in group and len(group.get("param_blocks", ())) == len(names):
        return tuple(group["blocks"]), list(group["param_blocks"])
    if "blocks" in group and all(param in flat for param in group["params"]):
        return tuple(group["blocks"]), [None] * len(names)  # the buffers' pieces know better
    raise ValueError(
        f"mask={kind}(...) drops whole transformer blocks and must know them: "
        "pass graddrop_kernels.param_groups(model) as the parameters, "
        f"or name the blocks with model.named_parameters() and {kind}(..., layers=['encoder.layer.*'])"
    )


def make_records(
    groups: list[dict[str, Any]], index: int, policy: Policy | None, flat: Flat
) -> tuple[list[ParamRecord], tuple[str, ...]]:
    """The records of group ``index``, and the blocks of the model (empty where the policy needs none).

    Raises ValueError as the functions above do.
    """
    group = groups[index]
    names = group_names(group, index, flat)
    blocks: tuple[str, ...] = ()
    param_blocks: list[str | None] = [None] * len(names)
    if policy is not None and policy.needs_blocks:
        blocks, param_blocks = group_blocks(groups, index, policy, flat)
    unit: Callable[[str, str | None], Hashable] = policy.unit if policy is not None else lambda name, block: None
    records = []
    for name, block, param in zip(names, param_blocks, group["params"]):
        pieces = []
        for piece in flat.get(param, ()):
            piece = piece._replace(name=canonical_name(piece.name))
            own_unit = unit(piece.name, block_of(piece.name, blocks))
            pieces.append((piece, stream_key(piece.name, group["seed"]), own_unit))
        if pieces and blocks:
            block = _block_of_buffer(name, pieces)
        records.append(ParamRecord(name, stream_key(name, group["seed"]), unit(name, block), tuple(pieces)))
    return records, blocks


def _block_of_buffer(name: str, pieces: list[tuple[FlatPiece, int, Any]]) -> str | None:
    """The block that everything in a flat buffer belongs to."""
    found = dict.fromkeys(unit for _, _, unit in pieces)
    if len(found) > 1:
        raise ValueError(
            f"the flat buffer {name!r} holds parameters of {len(found)} blocks ({list(found)[0]!r}, {list(found)[1]!r}"
            "...), which are dropped apart but would count their steps together: build it from parameter groups of one "
            "block each"
        )
    block: str | None = next(iter(found))
    return block


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
