"""The RowBlocks of a shard: which elements of the whole, contiguous parameter a local tensor holds.

shard_pieces finds the runs of indices along each dimension first, then the runs of the flat parameter.
"""

from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..masks.row_block import RowBlock
from .local import is_dtensor

if TYPE_CHECKING:

    pass


class Piece(NamedTuple):
    """A contiguous range of a local tensor's flat elements, and their positions in the whole parameter."""

    start: int  # first local flat index
    numel: int
    layout: RowBlock


def pieces_of(tensor: torch.Tensor) -> tuple[Piece, ...]:
    """The pieces of a tensor's elements on this rank, in local order. A plain tensor has one; a tensor without elements
    here has none.

    Raises ValueError as shard_pieces does.
    """
    if not is_dtensor(tensor):
        return (Piece(0, tensor.numel(), RowBlock.whole(tensor.numel())),) if tensor.numel() else ()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return shard_pieces(
        tensor.shape, tensor.placements, mesh.shape, coordinate and tuple(coordinate), tensor._local_tensor.shape
    )


@lru_cache(maxsize=4096)
def shard_pieces(
    shape: tuple[int, ...], placements: tuple[Any, ...], mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None, local_shape: tuple[int, ...],
) -> tuple[Piece, ...]:  # fmt: skip
    """The pieces of the shard at ``coordinate`` of a mesh, in local order.

    There is one piece if a RowBlock can describe the whole shard: all elements, a range, a block of rows and columns.
    There is none for a shard without elements, nor for a rank outside of the mesh, whose coordinate is None.

    Raises ValueError if a placement gives elements no owner (Partial), or if ``local_shape`` is not the shape of that
    shard.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    what = f"a tensor of shape {tuple(shape)} with placements {placements} on a mesh of shape {mesh_shape}"
    if not all(isinstance(placement, (Replicate, Shard, _StridedShard)) for placement in placements):
        raise ValueError(f"{what}: its elements have no owners; redistribute it to Shard or Replicate first")
    if coordinate is None:
        return ()
    held = []
    for dim, size in enumerate(shape):
        cuts = [
            _Cut(parts, part, getattr(placement, "split_factor", 1))
            for placement, parts, part in zip(placements, mesh_shape, coordinate)
            if not isinstance(placement, Replicate) and placement.dim == dim
        ]
        held.append(_held(size, cuts, local_shape[dim] if dim < len(local_shape) else None))
    computed = tuple(map(_total, held))
    if 0 in computed and 0 in local_shape:
        return ()  # FSDP2 may write (0, 0) for (8, 0)
    if computed != tuple(local_shape):
        raise ValueError(
            f"{what}: the shard at coordinate {coordinate} has shape {tuple(local_shape)}; it should be {computed}"
        )
    return tuple(_pieces(shape, held))


_Runs = list[tuple[int, int]]  # (first index, count) along one dimension, ascending


class _Cut(NamedTuple):
    """The cut of a tensor dimension by one mesh dimension into ``parts``. This rank takes number ``part``."""

    parts: int
    part: int
    split_factor: int  # 1: Shard


def _held(size: int, cuts: list[_Cut], local_size: int | None) -> _Runs:
    """The indices along a dimension that this rank holds.

    FSDP2 cuts what tensor parallelism has cut, although its mesh dimension comes first; _StridedShard says so. Read
    from left to right, as torch does, it means the same only while everything divides evenly. The order in which the
    cuts were made is therefore tried first, and what torch says only if that is not the shape that lies there. (On a
    few ranks of uneven shards both have one shape and different indices; of the two, only FSDP2 makes such tensors.)
    """
    order = _order(cuts)
    if order is not None:
        runs = [(0, size)]
        for cut in order:
            runs = _chunk(runs, cut.parts, cut.part)
        if _total(runs) == local_size:
            return runs
    runs = [(0, size)]
    for cut in cuts:
        chunks = [_chunk(runs, cut.split_factor, number) for number in range(cut.split_factor)]
        runs = [run for chunk in chunks for run in _chunk(chunk, cut.parts, cut.part)]
    return _merged(runs)


def _order(cuts: list[_Cut]) -> list[_Cut] | None:
    """The cuts in the order in which they were made, or None if their split factors do not show it.

    A split factor is the number of parts made before this cut by mesh dimensions that come later.
    """
    order: list[_Cut] = []
    for cut in reversed(cuts):
        parts_before = list(accumulate((other.parts for other in order), mul, initial=1))
        if cut.split_factor not in parts_before:
            return None
        order.insert(parts_before.index(cut.split_factor), cut)
    return order


def _chunk(runs: _Runs, parts: int, part: int) -> _Runs:
    """As torch.chunk: ceil(count / parts) indices a part; the last ones get fewer, or none."""
    size = -(-_total(runs) // parts)
    first, chunk = part * size, []
    for start, count in runs:
        low, high = max(first, 0), min(first + size, count)
        if low < high:
            chunk.append((start + low, high - low))
        first -= count
    return chunk


def _total(runs: _Runs) -> int:
    return sum(count for _, count in runs)


def _merged(runs: _Runs) -> _Runs:
    """Adjacent runs as one."""
    merged: _Runs = []
    for start, count in runs:
        if merged and sum(merged[-1]) == start:
            start, before = merged.pop()
            count += before
        merged.append((start, count))
    return merged


def _pieces(shape: tuple[int, ...], held: list[_Runs]) -> list[Piece]:
    """The elements whose index along each dimension is in the runs held of that dimension, which are not empty."""
    dims = [(1, [(0, 1)])]
    for size, runs in zip(shape, held):
        if runs == [(0, size)]:  # held completely: joined with the dimension before
            outer, outer_runs = dims.pop()
            dims.append((outer * size, [(start * size, count * size) for start, count in outer_runs]))
        else:
            dims.append((size, runs))
    *outer_dims, (columns, column_runs) = dims
    rows = [(0, 1)]
    for size, runs in outer_dims:
        rows = _each(rows, size, runs)
    if len(rows) == len(column_runs) == 1:
        (row, count), (column, width) = rows + column_runs
        layout = RowBlock(row * columns + column, width, columns if count > 1 else width)
        return [Piece(0, count * width, layout)]
    runs = _each(rows, columns, column_runs)
    return min(_grouped(runs), _grouped(_merged(runs)), key=len)  # each is the shorter one in some cases


def _each(rows: _Runs, size: int, runs: _Runs) -> _Runs:
    """The runs in each of the rows of ``size`` elements, as runs of the flat elements."""
    return [
        (row * size + start, count)
        for first, row_count in rows
        for row in range(first, first + row_count)
        for start, count in runs
    ]


def _grouped(runs: _Runs) -> list[Piece]:
    """Puts runs into one piece as long as they are rows of one RowBlock. Rows have equal counts and distances; the last
    may be shorter.
    """
    pieces, local, row = [], 0, 0
    while row < len(runs):
        base, inner = runs[row]
        distance = runs[row + 1][0] - base if row + 1 < len(runs) else inner
        first, numel = row, 0
        while (
            row < len(runs)
            and numel == (row - first) * inner
            and runs[row][1] <= inner
            and runs[row][0] == base + (row - first) * distance
        ):
            numel += runs[row][1]
            row += 1
        pieces.append(Piece(local, numel, RowBlock(base, inner, distance if row - first > 1 else inner)))
        local += numel
    return pieces
