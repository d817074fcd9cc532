"""Copies of small tables to a GPU through a ring of pinned buffers."""

import torch


class Upload:
    """A uint8 tensor on a device that is written from the host without waiting.

    A copy may still be reading its pinned buffer when the next step writes. So buffers are used in turn, and if the
    next one is still being read, another is made.
    """

    def __init__(self, size: int, device: torch.device):
        self.device: torch.Tensor = torch.zeros(-(-size // 16) * 16, dtype=torch.uint8, device=device)
        self.buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        # Nothing can be allocated while a graph is captured. A buffer that a graph copies from is never written again.
        self.spare: torch.Tensor | None = self._pinned()
        self.captured: list[torch.Tensor] = []

    def _pinned(self) -> torch.Tensor:
        return torch.empty(
            self.device.numel(), dtype=torch.uint8, device="cpu", pin_memory=self.device.is_cuda
        )

    def write_captured(self, data: bytes) -> None:
        """Records in the graph that is being captured a copy of ``data`` to the beginning of the tensor.

        Raises:
            RuntimeError: another graph was captured since the last ``write``.
        """
        if self.spare is None:
            if bytes(self.captured[-1][: len(data)].numpy()) == data:
                return  # the norm of the same step has recorded it
            raise RuntimeError("call step() once between the captures of two CUDA graphs")
        buffer, self.spare = self.spare, None
        self.captured.append(buffer)
        buffer[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.device[: len(data)].copy_(buffer[: len(data)], non_blocking=True)

    def write(self, data: bytes, begin: int) -> None:
        """Replaces the bytes from ``begin`` on, in the order of the current stream."""
        if self.spare is None:
            self.spare = self._pinned()
        target = self.device[begin : begin + len(data)]
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if target.device.type == "cpu":
            target.copy_(source)
            return
        if not self.buffers or not self.buffers[0][1].query():
            buffer = self._pinned()
            self.buffers.insert(0, (buffer, torch.cuda.Event()))
        buffer, read = self.buffers.pop(0)
        pinned = buffer[: len(data)]
        pinned.copy_(source)
        target.copy_(pinned, non_blocking=True)
        read.record(torch.cuda.current_stream(target.device))
        self.buffers.append((buffer, read))
