"""The resident memory of this process (Linux)."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def peak_growth(work: Callable[[], object]) -> int | None:
    """Returns the bytes by which the resident memory grows at most while ``work`` runs; None if /proc does not tell."""

    def resident(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory, so that work that takes it again is seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (OSError, AttributeError):
        work()
        return None
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)
