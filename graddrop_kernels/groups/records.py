"""ParamRecord and Span: the name, random stream and unit of each parameter, and which of its elements are here."""

import itertools
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, NamedTuple

import torch

from ..masks.philox import stream_key
from ..masks.row_block import RowBlock
from ..policies import LEFT_OUT, Policy
from ..policies.rows import NO_ROWS, Rows, Runs
from ..tensors.local import is_dtensor
from ..tensors.shard_layout import pieces_of
from .flat_buffers import Flat, FlatBuffers, FlatPiece
from .names import LayerMatch, block_of, canonical_name


class PieceRecord(NamedTuple):
    """What is known of a parameter in a flat buffer. ``runs``: as of spans_of(), None if the piece is trained whole."""

    piece: FlatPiece
    key: int
    unit: Hashable
    runs: Runs | None


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """The name, random stream and unit of one parameter.

    ``unit``: parameters with the same unit share one MaskPlan (see Policy.unit). It is a block's name, for example.

    ``rows``: those that are trained; None: the plan says what is.

    ``flat``: each parameter in a flat buffer; empty if the tensor is one parameter.
    """

    name: str
    key: int
    unit: Hashable
    rows: Rows | None = None
    flat: tuple[PieceRecord, ...] = ()


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
            f"parameter group {index} has {len(params)} tensors but {len(names)} names. If you took out or put in a "
            "tensor, do the same with group['param_names']. If a wrapper has flattened them, masks drawn for its "
            "buffer would depend on the sharding: build the optimizer from the tensors that it will step, or see "
            "graddrop_kernels.attach_fsdp1 and attach_deepspeed"
        )
    return [canonical_name(name) for name in names]


class LayerMatches:
    """Which blocks the ``layers`` patterns of policies find in an optimizer. A new group costs only its own names.

    Whether a block has something to train is seen when its parameters come. It has a turn in schedules ever after, so
    that the turns of others do not change when it is frozen or leaves out a backward pass.
    """

    def __init__(self) -> None:
        self._matches: dict[tuple[str, ...], tuple[LayerMatch, list[Any]]] = {}

    def of(self, layers: tuple[str, ...], groups: list[dict[str, Any]], flat: Flat) -> LayerMatch:
        """The match of the patterns with the names in all groups.

        Raises ValueError as LayerMatch.check() does.
        """
        given: list[Any] = list(map(methodcaller("get", "param_names"), groups))
        if flat:  # the names in flat buffers change with the buffers, as in DeepSpeed's stage 3
            given = [(names, *map(id, group["params"])) for names, group in zip(given, groups)]
        match, seen = self._matches.get(layers, (None, []))
        if match is None or seen != given[: len(seen)]:
            match, seen = LayerMatch(layers), []
        for index in range(len(seen), len(groups)):
            match.add(_names_with_flat(groups[index], index, flat))
        self._matches[layers] = match, given
        match.check()
        return match


def _names_with_flat(group: dict[str, Any], index: int, flat: Flat) -> list[tuple[str, bool]]:
    """(canonical name, whether it is trained) of a group's parameters, with those of flat buffers in place of these."""
    return [
        (each, param in flat or param.requires_grad)
        for param, name in zip(group["params"], group_names(group, index, flat))
        for each in ([canonical_name(piece.name) for piece in flat[param]] if param in flat else [name])
    ]


def group_blocks(
    groups: list[dict[str, Any]], index: int, policy: Policy, flat: Flat, matches: LayerMatches
) -> tuple[Callable[[], tuple[str, ...]], Callable[[str], str | None], list[str | None]]:
    """(() -> blocks with a turn, in forward order; name -> its block; the block of each parameter of group ``index``),
    for a policy of blocks.

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
        match = matches.of(policy.layers, groups, flat)
        return match.blocks, match.block_of, list(map(match.block_of, names))
    blocks = tuple(group.get("blocks", ()))
    known = dict.fromkeys(blocks)
    of_name = lambda name: block_of(name, known)
    if "block" in group:  # param_groups(..., per_block=True), of which an engine may make any number of tensors
        return lambda: blocks, of_name, [group["block"]] * len(names)
    if "blocks" in group and len(group.get("param_blocks", ())) == len(names):
        return lambda: blocks, of_name, list(group["param_blocks"])
    if "blocks" in group and all(param in flat for param in group["params"]):
        return lambda: blocks, of_name, [None] * len(names)  # the pieces of a buffer have blocks of their own
    if "no_blocks" in group:
        raise ValueError(f"mask={kind}(...) drops whole transformer blocks: {group['no_blocks']}")
    raise ValueError(
        f"mask={kind}(...) drops whole transformer blocks and must know them: "
        "pass graddrop_kernels.param_groups(model) as the parameters, "
        f"or name the blocks with model.named_parameters() and {kind}(..., layers=['encoder.layer.*'])"
    )


def make_records(
    groups: list[dict[str, Any]], index: int, policy: Policy | None, buffers: FlatBuffers, matches: LayerMatches
) -> tuple[list[ParamRecord], Callable[[], tuple[str, ...]]]:
    """The records of group ``index``, and a function that returns the blocks of the model, which are none if the policy
    needs none.

    Raises ValueError as the functions above do.
    """
    group, flat = groups[index], buffers.pieces
    names = group_names(group, index, flat)
    blocks: Callable[[], tuple[str, ...]] = tuple
    of_name: Callable[[str], str | None] = lambda name: None
    param_blocks: list[str | None] = [None] * len(names)
    needs_blocks = policy is not None and policy.needs_blocks
    if policy is not None and needs_blocks:
        blocks, of_name, param_blocks = group_blocks(groups, index, policy, flat, matches)
    unit: Callable[[str, str | None], Hashable] = policy.unit if policy is not None else lambda name, block: None
    records = []
    for name, block, param in zip(names, param_blocks, group["params"]):
        pieces = []
        for piece in flat.get(param, ()):
            piece = piece._replace(name=canonical_name(piece.name))
            runs = _runs_of_piece(policy, piece.name, buffers.shapes)
            pieces.append(
                PieceRecord(piece, stream_key(piece.name, group["seed"]), unit(piece.name, of_name(piece.name)), runs)
            )
        if pieces and needs_blocks:
            block = _block_of_buffer(name, pieces)
        rows = policy.rows_of(name) if policy is not None and param not in flat else None
        records.append(ParamRecord(name, stream_key(name, group["seed"]), unit(name, block), rows, tuple(pieces)))
    return records, blocks


def _runs_of_piece(
    policy: Policy | None, name: str, shapes: Mapping[str, tuple[int, ...]] | None
) -> Runs | None:  # fmt: skip
    """The runs of elements that are trained of a parameter in a flat buffer. Raises ValueError if its shape, which a
    buffer does not show, is needed and not known.
    """
    rows = policy.rows_of(name) if policy is not None else None
    if policy is None or rows is None or rows == NO_ROWS:
        return None if rows is None else ()
    if shapes is None or name not in shapes:
        raise ValueError(
            f"{type(policy).__name__}: the shape of {name!r} in a flat buffer is not known, nor are its rows: give "
            "attach_pieces() the shapes of all parameters"
        )
    policy.check_shape(name, shapes[name])
    return _elements(rows, shapes[name])


def _elements(rows: Rows, shape: tuple[int, ...]) -> Runs:
    """The runs of the flat elements of these rows."""
    if rows == NO_ROWS:
        return ()
    width = math.prod(shape[1:])
    return tuple((start * width, stop * width) for start, stop in rows.runs(shape[0]))


def _block_of_buffer(name: str, pieces: list[PieceRecord]) -> str | None:
    """The one block that all parameters in a flat buffer belong to. Raises ValueError if there are several."""
    found: dict[Any, None] = dict.fromkeys(each.unit for each in pieces)
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
    state: slice  # of the flat elements of a moment, which may have fewer rows than the parameter


def spans_of(param: torch.Tensor, record: ParamRecord, left_out: bool = False) -> tuple[Span, ...]:
    """The spans of a parameter's local tensor. Where nothing is trained in this process, as of an empty shard, there is
    one empty span, so that the step count advances with the other ranks'.

    Args:
        left_out: adds spans of the unit LEFT_OUT, for the rows that are not trained.
    """
    spans: list[Span] = []
    others: list[Span] = []
    for span, runs in _held(param, record):
        spans += [span] if runs is None else _within(span, runs)
        if left_out and runs is not None:
            gaps = zip((0, *(stop for _, stop in runs)), (*(start for start, _ in runs), sys.maxsize))
            others += [each._replace(unit=LEFT_OUT) for each in _within(span, tuple(gaps))]
    if trained_rows(param, record) is not None:  # the state has these rows only, side by side
        starts = itertools.accumulate((span.numel for span in spans), initial=0)
        spans = [span._replace(state=slice(start, start + span.numel)) for start, span in zip(starts, spans)]
        others = [span._replace(state=slice(0, 0)) for span in others]
    empty = Span(0, 0, record.name, record.key, record.unit, RowBlock.whole(0), slice(0, 0))
    return (*(spans or [empty]), *others)


def _held(param: torch.Tensor, record: ParamRecord) -> Iterator[tuple[Span, Runs | None]]:
    """(span, the runs that are trained of the whole parameter that it belongs to) of all that this process has."""
    for (name, start, first, numel), key, unit, runs in record.flat:
        if numel:
            yield Span(start, numel, name, key, unit, RowBlock(first, numel, numel), slice(start, start + numel)), runs
    if not record.flat:
        runs = None if record.rows is None else _elements(record.rows, tuple(param.shape))
        for start, numel, layout in pieces_of(param):
            span = Span(start, numel, record.name, record.key, record.unit, layout, slice(start, start + numel))
            yield span, runs


def _within(span: Span, runs: Runs) -> Iterator[Span]:
    """The parts of a span that lie in these runs."""
    for start, stop in runs:
        for first, numel, layout in span.layout.within(span.numel, start, stop) if start < stop else ():
            begin = span.start + first
            yield span._replace(start=begin, numel=numel, layout=layout, state=slice(begin, begin + numel))


def kept_rows(param: torch.Tensor, record: ParamRecord, layout: RowBlock, numel: int) -> torch.Tensor:
    """Whether each element of a layout is in a row that is trained: bool, shape (numel,)."""
    keep = torch.zeros(numel, dtype=torch.bool, device=param.device)
    for start, stop in _elements(record.rows or NO_ROWS, tuple(param.shape)):
        for first, count, _ in layout.within(numel, start, stop):
            keep[first : first + count] = True
    return keep


def trained_rows(param: torch.Tensor, record: ParamRecord) -> Runs | None:
    """The runs of rows that a parameter's moments and masters consist of. None: they have the parameter's shape, as
    those of sharded parameters have, which engines and checkpoints pair with their shards.
    """
    if record.rows is None or record.flat or is_dtensor(param):
        return None
    return record.rows.runs(param.shape[0]) if record.rows != NO_ROWS else ()
