"""ParamRecord: the name, random stream, unit and trained rows of each parameter."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, NamedTuple

from ..masks.philox import stream_key
from ..policies import Policy
from ..policies.rows import Rows, Runs
from .flat_buffers import Flat, FlatBuffers, FlatPiece
from .names import LayerMatch, block_of, canonical_name


class PieceRecord(NamedTuple):
    """What is known of a parameter in a flat buffer. ``runs``: those of elements that are trained; None: all are."""

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

    @property
    def units(self) -> list[Hashable]:
        """The units of all that the tensor holds."""
        return [each.unit for each in self.flat] or [self.unit]


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
    if policy is None or rows is None or not rows.parts:
        return None if rows is None else ()
    if shapes is None or name not in shapes:
        raise ValueError(
            f"{type(policy).__name__}: the shape of {name!r} in a flat buffer is not known, nor are its rows: give "
            "attach_pieces() the shapes of all parameters"
        )
    policy.check_shape(name, shapes[name])
    return rows.elements(shapes[name])


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
