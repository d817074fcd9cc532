"""Rows: a choice among the rows of a tensor, which are the indices of its dimension 0."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch

Runs = tuple[tuple[int, int], ...]  # (first, one after the last), ascending, none beside the next

_PART = re.compile(r"(-?\d+)|(-?\d*):(-?\d*)(?::(\d*[1-9]\d*)?)?")


class _Slice(NamedTuple):
    """As a slice, which cannot be hashed. ``step`` is at least 1."""

    start: int | None
    stop: int | None
    step: int


@dataclass(frozen=True)
class Rows:
    """Rows, as they were given: negative and open ends are known only beside a tensor.

    ``of``: the length of the bool vector that they were given as; None if they were given in another way.
    """

    parts: tuple[_Slice, ...]
    of: int | None = None

    @staticmethod
    def parse(given: Any) -> "Rows":
        """Rows given as a slice, a range, ints, a bool vector, or text such as ``"5,17,128256:"``.

        Raises:
            ValueError: anything else, or no rows.
        """
        of = None
        if isinstance(given, str):
            parts = [_of_text(part.strip()) for part in given.split(",")]
        elif isinstance(given, slice) or (isinstance(given, range) and given.start >= 0 <= given.stop):
            parts = [_of_slice(given)]  # in a range, unlike in a slice, a negative end does not count from the last row
        else:
            values = _values(given)
            if values and all(isinstance(value, bool) for value in values):
                of, values = len(values), [index for index, value in enumerate(values) if value]
            if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                raise ValueError(f"{_USAGE}, got {given!r}"[:300])
            parts = [_one(value) for value in values]
        if not parts:
            raise ValueError("no rows; leave the parameter out, and give rest='frozen' to freeze it")
        return Rows(tuple(_canonical(parts)), of)

    def __str__(self) -> str:
        return ",".join(map(_text, self.parts))

    def share(self, shape: tuple[int, ...]) -> float:
        """The share of the elements of a tensor that are in these rows."""
        return sum(stop - start for start, stop in self.elements(shape)) / max(math.prod(shape), 1)

    def elements(self, shape: tuple[int, ...]) -> Runs:
        """The runs of the flat elements of these rows in a tensor, in its contiguous order. Raises as runs() does."""
        if not self.parts:
            return ()
        width = math.prod(shape[1:])
        return tuple((start * width, stop * width) for start, stop in self.runs(shape[0]))

    @lru_cache(maxsize=1024)  # noqa: B019 (of values, which are small)
    def runs(self, size: int) -> Runs:
        """The runs of these rows in a tensor of ``size`` rows.

        Raises:
            ValueError: a row that it does not have, or a bool vector of another length.
        """
        if self.of not in (None, size):
            raise ValueError(f"a bool vector of {self.of}, but there are {size} rows")
        for part in self.parts:
            ends = [end for end in (part.start, part.stop) if end is not None]
            if any(not -size <= end <= size for end in ends) or not range(*slice(*part).indices(size)):
                raise ValueError(f"rows {_text(part)}, but there are {size} rows")
        indices = [range(*slice(*part).indices(size)) for part in self.parts]
        return tuple(_merged(run for each in indices for run in _runs_of(each)))


NO_ROWS = Rows(())

_USAGE = "rows must be a slice, ints, a bool vector with an entry per row, or text such as '5,17,128256:'"


def _values(given: Any) -> list[Any]:
    if isinstance(given, torch.Tensor) or hasattr(given, "tolist"):  # of NumPy
        if given.ndim > 1:
            raise ValueError(f"{_USAGE}, got an array of shape {tuple(given.shape)}")
        if str(given.dtype).endswith("uint8"):
            raise ValueError(f"{_USAGE}, got uint8, a mask to some and ints to others: convert it to bool or int64")
        try:
            given = given.tolist()
        except RuntimeError:
            what = f"without readable values ({given.layout}, {given.device})"
            raise ValueError(f"{_USAGE}, got a tensor {what}") from None
    if isinstance(given, Integral) and not isinstance(given, bool):
        return [int(given)]
    if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray)):
        raise ValueError(f"{_USAGE}, got {given!r}")
    return [int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value for value in given]


def _one(row: int) -> _Slice:
    return _Slice(row, row + 1 if row != -1 else None, 1)


def _of_text(text: str) -> _Slice:
    found = _PART.fullmatch(text)
    if found is None:
        raise ValueError(f"{_USAGE}, got {text!r}")
    row, start, stop, step = found.groups()
    if row is not None:
        return _one(int(row))
    return _Slice(int(start) if start else None, int(stop) if stop else None, int(step or 1))


def _of_slice(given: slice | range) -> _Slice:
    step = 1 if given.step is None else given.step
    if not all(end is None or type(end) is int for end in (given.start, given.stop)) or type(step) is not int:
        raise ValueError(f"{_USAGE}, got {given!r}")
    if step < 1:
        raise ValueError(f"{given!r} counts down: give a step of at least 1")
    return _Slice(given.start, given.stop, step)


def _text(part: _Slice) -> str:
    start, stop = ("" if end is None else str(end) for end in part[:2])
    if part == _one(part.start or 0) and part.start is not None:
        return start
    return f"{start}:{stop}" if part.step == 1 else f"{start}:{stop}:{part.step}"


def _canonical(parts: Sequence[_Slice]) -> list[_Slice]:
    """Equal rows in equal words, as far as that is seen without a tensor."""
    known = [part for part in parts if part.stop is not None and part.stop >= 0 and (part.start or 0) >= 0]
    runs = _merged(run for part in known for run in _runs_of(range(part.start or 0, part.stop or 0, part.step)))
    others = sorted(set(parts).difference(known), key=_text)
    empty = [part for part in known if not range(part.start or 0, part.stop or 0, part.step)]  # refused beside a tensor
    return [*(_Slice(start, stop, 1) for start, stop in runs), *empty, *others]


def _runs_of(indices: range) -> Iterator[tuple[int, int]]:
    if indices.step == 1:
        if indices:
            yield indices.start, indices.stop
    else:
        yield from ((index, index + 1) for index in indices)


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            start, stop = merged[-1][0], max(stop, merged.pop()[1])
        merged.append((start, stop))
    return merged
