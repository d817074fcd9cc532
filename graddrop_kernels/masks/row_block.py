"""RowBlock: the positions of a local tensor's elements in the whole parameter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:

    pass


@dataclass(frozen=True)
class RowBlock:
    """Local flat index i -> global flat index  base + (i // local_inner) * global_inner + i % local_inner.

    A whole parameter or any contiguous range has one row, with local_inner = global_inner = its numel. Columns
    [o, o + c) of an [R, C] matrix have base = o, local_inner = c, global_inner = C. Every backend takes a RowBlock, so
    that a mask does not depend on the sharding.
    """

    base: int
    local_inner: int
    global_inner: int

    @staticmethod
    def whole(numel: int) -> "RowBlock":
        """The layout of an unsharded parameter."""
        return RowBlock(0, max(numel, 1), max(numel, 1))

    def runs(self, numel: int) -> Iterator[tuple[int, int, int]]:
        """(local start, global start, length) of each contiguous run, in local order."""
        for row, start in enumerate(range(0, numel, self.local_inner)):
            yield start, self.base + row * self.global_inner, min(self.local_inner, numel - start)
