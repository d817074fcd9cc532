"""Span: which of a parameter's elements are in this process, and which of these are trained."""

import itertools
import sys
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch

from ..masks.row_block import RowBlock
from ..policies import LEFT_OUT
from ..policies.rows import NO_ROWS, Runs
from ..tensors.local import is_dtensor
from ..tensors.shard_layout import pieces_of
from .records import ParamRecord


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
        runs = None if record.rows is None else record.rows.elements(tuple(param.shape))
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
    for start, stop in (record.rows or NO_ROWS).elements(tuple(param.shape)):
        for first, count, _ in layout.within(numel, start, stop):
            keep[first : first + count] = True
    return keep


def trained_rows(param: torch.Tensor, record: ParamRecord) -> Runs | None:
    """The runs of rows that a parameter's moments and masters consist of. None: they have the parameter's shape, as
    those of sharded parameters have, which engines and checkpoints pair with their shards.
    """
    if record.rows is None or record.flat or is_dtensor(param):
        return None
    return record.rows.runs(param.shape[0]) if record.rows.parts else ()
