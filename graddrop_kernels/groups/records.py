"""ParamRecord and Span: the name, random stream and unit of each parameter, and which of its elements are here."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..masks.philox import stream_key
from ..masks.row_block import RowBlock
from ..policies import Policy
from ..tensors.shard_layout import pieces_of
from .flat_buffers import Flat, FlatPiece
from .names import block_of, canonical_name, match_layers


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """The name, random stream and unit of one parameter.

    ``unit``: parameters with the same unit share one MaskPlan (see Policy.unit). It is a block's name, for example.

    ``flat``: (piece, random stream, unit) of each parameter in a flat buffer; empty if the tensor is one parameter.
    """

    name: str
    key: int
    unit: Hashable
    flat: tuple[tuple[FlatPiece, int, Hashable], ...] = ()


def group_names(group: dict[str, Any], index: int, flat: Flat) -> list[str]:
    """Canonical names of a group's parameters. Parameters given without names, and flat buffers that a wrapper has put
    in their place, are called "{group}.{position}".

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
            "build the optimizer from the tensors that it will step, or see graddrop_kernels.attach_fsdp1 and "
            "attach_deepspeed"
        )
    return [canonical_name(name) for name in names]


def _names_of_model(groups: list[dict[str, Any]], flat: Flat, only_trained: bool = False) -> list[str]:
    """Canonical names of all parameters in all groups, with those inside of flat buffers in place of the buffers."""
    return [
        each
        for index, group in enumerate(groups)
        for param, name in zip(group["params"], group_names(group, index, flat))
        if param.requires_grad or not only_trained
        for each in ([canonical_name(piece.name) for piece in flat[param]] if param in flat else [name])
    ]


def group_blocks(
    groups: list[dict[str, Any]], index: int, policy: Policy, flat: Flat
) -> tuple[tuple[str, ...], list[str | None]]:
    """(blocks with a turn, in forward order; the block of each parameter of group ``index``), for a policy of blocks.

    The blocks come from the policy's ``layers`` patterns, else from the keys that ``param_groups`` puts into a group.

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
        known = set(blocks)
        trained = {block_of(name, known) for name in _names_of_model(groups, flat, only_trained=True)}
        turns = [block for block in blocks if block in trained] or blocks
        return tuple(turns), [block_of(name, known) for name in names]
    if "block" in group:  # param_groups(..., per_block=True), of which an engine may make any number of tensors
        return tuple(group["blocks"]), [group["block"]] * len(names)
    if "blocks" in group and len(group.get("param_blocks", ())) == len(names):
        return tuple(group["blocks"]), list(group["param_blocks"])
    if "blocks" in group and all(param in flat for param in group["params"]):
        return tuple(group["blocks"]), [None] * len(names)  # the pieces of a buffer have blocks of their own
    if "no_blocks" in group:
        raise ValueError(f"mask={kind}(...) drops whole transformer blocks: {group['no_blocks']}")
    raise ValueError(
        f"mask={kind}(...) drops whole transformer blocks and must know them: "
        "pass graddrop_kernels.param_groups(model) as the parameters, "
        f"or name the blocks with model.named_parameters() and {kind}(..., layers=['encoder.layer.*'])"
    )


def make_records(
    groups: list[dict[str, Any]], index: int, policy: Policy | None, flat: Flat
) -> tuple[list[ParamRecord], tuple[str, ...]]:
    """The records of group ``index``, and the blocks of the model, which are empty if the policy needs none.

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
    """The one block that all parameters in a flat buffer belong to. Raises ValueError if there are several."""
    found = dict.fromkeys(unit for _, _, unit in pieces)
    if len(found) > 1:
        raise ValueError(
            f"the flat buffer {name!r} holds parameters of {len(found)} blocks ({list(found)[0]!r}, {list(found)[1]!r}"
            "...), which are dropped apart but would count their steps together: build it from parameter groups of one "
            "block each"
        )
    block: str | None = next(iter(found))
    return block


class Span(NamedTuple):
    """A contiguous range of a local tensor's flat elements. It is one row of the kernels' tables."""

    start: int
    numel: int
    name: str  # of the parameter it belongs to
    key: int  # of the parameter's random stream
    unit: Hashable  # of the policy
    layout: RowBlock  # which elements of the whole parameter these are


def spans_of(param: torch.Tensor, record: ParamRecord) -> tuple[Span, ...]:
    """The spans of a parameter's local tensor. An empty shard gives one empty span, so that its step count advances
    with the other ranks'.
    """
    if record.flat:
        spans = tuple(
            Span(start, numel, name, key, unit, RowBlock(first, numel, numel))
            for (name, start, first, numel), key, unit in record.flat
            if numel
        )
    else:
        spans = tuple(
            Span(start, numel, record.name, record.key, record.unit, layout)
            for start, numel, layout in pieces_of(param)
        )
    return spans or (Span(0, 0, record.name, record.key, record.unit, RowBlock.whole(0)),)
