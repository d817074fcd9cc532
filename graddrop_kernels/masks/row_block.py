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

    def within(self, numel: int, start: int, stop: int) -> Iterator[tuple[int, int, "RowBlock"]]:
        """(local start, count, layout) of the elements with global indices from ``start`` to before ``stop``, in local
        order. There are at most three parts: whole runs, and what ``start`` and ``stop`` leave of one.

        Args:
            numel: of the local tensor.
        """
        inner, outer = self.local_inner, self.global_inner
        # The runs that have any of these elements. The last of all may be shorter than the others.
        first = max(0, (start - self.base - inner) // outer + 1)
        last = min((numel - 1) // inner, (stop - 1 - self.base) // outer)
        whole_first = first + (self.base + first * outer < start)
        whole_last = last - (self.base + last * outer + inner > stop)
        after = max(whole_first, whole_last + 1)
        parts = range(first, whole_first), range(whole_first, whole_last + 1), range(after, last + 1)
        for rows in filter(len, parts):
            begin = self.base + rows[0] * outer
            skipped = max(start - begin, 0) if len(rows) == 1 else 0
            local_start = rows[0] * inner + skipped
            count = min((rows[-1] + 1) * inner, numel) - local_start
            if len(rows) == 1:
                count = min(count, stop - begin - skipped)
            if count > 0:
                strides = (inner, outer) if count > inner else (count, count)
                yield local_start, count, RowBlock(begin + skipped, *strides)
