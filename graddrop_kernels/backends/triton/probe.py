"""Whether the Triton kernels can run here, and on which devices."""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1, set before triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


DEVICES = ("cpu",) if interpreted() else ("cuda",)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """None when the kernels can run, else the reason and the remedy."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux)"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU; with TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for tests"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None
