"""The resident memory of this process (Linux)."""

import contextlib
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

M_MMAP_THRESHOLD = -3  # in malloc.h


def start_peak() -> int | None:
    """Lets the peak of the resident memory start from here. Returns the bytes resident now; None if /proc does not
    report them.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory, so that who takes it again is seen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return resident("VmRSS")


def return_at_once() -> None:
    """Lets every larger tensor that is freed go back to the system at once (glibc), so that the resident memory is what
    is in use. Otherwise what was freed and not yet taken again counts, too. It makes steps slower.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def peak() -> int:
    """Returns the bytes at the peak of the resident memory since ``start_peak()``."""
    return resident("VmHWM")


def peak_growth(step: Callable[[], object]) -> int | None:
    """Returns the bytes by which the resident memory grows while ``step`` runs; None if /proc does not report it."""
    before = start_peak()
    step()
    return None if before is None else max(0, peak() - before)


def resident(field: str) -> int:
    """Returns a line of this process's status in bytes: "VmRSS", what is resident, or "VmHWM", its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
