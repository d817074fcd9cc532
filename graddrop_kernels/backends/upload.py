"""Copies of small tables to a GPU through a ring of pinned buffers."""

from typing import Any

import numpy as np
import torch


class Upload:
    """A uint8 tensor on a device that is written from the host without waiting.

    A copy may still be reading its pinned buffer when the next step writes. So buffers are used in turn, and if the
    next one is still being read, another is made.
    """

    def __init__(self, size: int, device: torch.device):
        self.device: torch.Tensor = torch.zeros(-(-size // 16) * 16, dtype=torch.uint8, device=device)
        self._array = self.device.numpy() if self.device.device.type == "cpu" else None
        self._ring: list[tuple[torch.Tensor, Any, torch.cuda.Event]] = []
        # Nothing can be allocated while a graph is captured. It copies from this buffer in every replay.
        self._image = self._pinned()

    def _pinned(self) -> torch.Tensor:
        return torch.empty(
            self.device.numel(), dtype=torch.uint8, device="cpu", pin_memory=self.device.is_cuda
        )

    def write_captured(self, *pieces: Any) -> None:
        """Records in the graph that is being captured a copy of ``pieces`` to the beginning of the tensor. Once."""
        size = _fill(self._image.numpy(), pieces)
        self.device[:size].copy_(self._image[:size], non_blocking=True)

    def write(self, begin: int, *pieces: Any) -> None:
        """Replaces the bytes from ``begin`` on, in the order of the current stream.

        Args:
            pieces: arrays or bytes, which follow each other.
        """
        if self._array is not None:
            _fill(self._array[begin:], pieces)
            return
        if not self._ring or not self._ring[0][2].query():
            buffer = self._pinned()
            self._ring.insert(0, (buffer, buffer.numpy(), torch.cuda.Event()))
        buffer, array, read = self._ring.pop(0)
        size = _fill(array, pieces)
        self.device[begin : begin + size].copy_(buffer[:size], non_blocking=True)
        read.record(torch.cuda.current_stream(self.device.device))
        self._ring.append((buffer, array, read))


def _fill(target: Any, pieces: tuple[Any, ...]) -> int:
    """Writes the bytes of all pieces to the beginning of an array of bytes; returns their number. By numpy, which takes
    1 us where ``copy_`` goes through OpenMP.
    """
    end = 0
    for piece in pieces:
        array = np.frombuffer(piece, np.uint8)
        target[end : end + array.size] = array
        end += array.size
    return end
