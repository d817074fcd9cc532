"""MemoryOrder: the order in which a dense tensor's elements lie in memory, if it is not that of their indices."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MemoryOrder:
    """``dims`` are the dimensions of ``shape`` from the outermost in memory to the innermost. Every mask rule numbers
    elements by their indices, whatever the order is.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]

    @staticmethod
    def of(shape: tuple[int, ...], strides: tuple[int, ...]) -> "MemoryOrder | None":
        """The order of a tensor that fills its memory without gaps or overlaps; None for any other. Dimensions of one
        element lie nowhere, and are left out.
        """
        dims = sorted((dim for dim, size in enumerate(shape) if size > 1), key=lambda dim: -strides[dim])
        dense = 1
        for dim in reversed(dims):
            if strides[dim] != dense:
                return None
            dense *= shape[dim]
        order = MemoryOrder(tuple(shape), tuple(dims))
        return order if 0 not in shape else None

    def bits(self, bits: torch.Tensor) -> torch.Tensor:
        """One value per element, by index, in the order of memory."""
        rest = (dim for dim, size in enumerate(self.shape) if size == 1)
        return bits.view(self.shape).permute(*rest, *self.dims).flatten()

    def transposed(self) -> tuple[int, int] | None:
        """(a, b) if memory holds a matrix [b, a] for each matrix [a, b] of the indices, as under channels_last or a
        transposition; else None.
        """
        ordered = sorted(self.dims)
        same = next((i for i, (dim, other) in enumerate(zip(ordered, self.dims)) if dim != other), None)
        if same is None:
            return None
        indices, memory = ordered[same:], list(self.dims[same:])
        cut = memory.index(indices[0])
        if memory[cut:] + memory[:cut] != indices:
            return None
        sizes = [1, 1]
        for position, dim in enumerate(memory):
            sizes[position < cut] *= self.shape[dim]
        return sizes[0], sizes[1]
