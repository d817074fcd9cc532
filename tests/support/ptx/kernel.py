"""Kernel: an entry of a PTX text, compiled for the CPU, that can be launched on addresses."""

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p

from . import build
from .parse import Module
from .translate import translate


class Fault(Exception):
    """A launch did what no launch may do: the text says what, and at which instruction."""


class Kernel:
    """``in_step``: see translate()."""

    def __init__(self, module: Module, entry: str, in_step: bool = False):
        self.name = entry
        source, self._translation = translate(module, entry, in_step)
        self._run = build.machine().ptx_launch  # first: the kernel's library takes its symbols
        self._library = build.library(source, build.KERNEL)
        self._run.argtypes = [
            c_void_p, c_uint64, c_char_p, c_void_p, c_uint64, c_uint32, c_uint32, c_uint32, c_int, c_uint64, c_char_p,
            c_uint64, c_void_p,
        ]  # fmt: skip

    def launch(
        self, blocks: int, threads: int, arguments: Sequence[int | bytes], spans: Iterable[tuple[int, int]], seed: int,
        shared: int = 0,
    ) -> None:  # fmt: skip
        """Runs the blocks in the order that the seed draws.

        Args:
            arguments: the parameters in order; structs as their bytes. Those that are left out are 0.
            spans: (address, bytes) of the memory that the threads may access.
            shared: bytes of shared memory beside what the text declares.

        Raises:
            Fault: an access beside the spans or of a wrong alignment, threads that do not meet, a missing barrier.
        """
        offsets = self._translation.offsets
        parameters = bytearray(sum(offsets[-1]))
        for (offset, size), value in zip(offsets, arguments):
            parameters[offset : offset + size] = (
                value if isinstance(value, bytes) else (value % 2 ** (8 * size)).to_bytes(size, "little")
            )
        ranges = _merged(spans)
        flat = (c_uint64 * (2 * len(ranges)))(*(number for each in ranges for number in each))
        message, instruction = ctypes.create_string_buffer(400), c_uint32()
        failed = self._run(
            self._library.kernel, c_uint64.in_dll(self._library, "register_bytes").value,
            bytes(parameters), flat, len(ranges), blocks, threads,
            self._translation.shared_bytes + shared, self._translation.meets, seed, message, len(message),
            ctypes.byref(instruction),
        )  # fmt: skip
        if failed:
            raise Fault(
                f"{self.name}: {message.value.decode()} at `{self._translation.texts[instruction.value]}` "
                f"(launch with the seed {seed})"
            )


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, end) of the spans in order, one for those that overlap, but not for neighbours."""
    ranges: list[tuple[int, int]] = []
    for begin, size in sorted(spans):
        if ranges and begin < ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], begin + size)
        else:
            ranges.append((begin, begin + size))
    return ranges
