"""Memory bandwidth: STREAM's copy and triad, and AdamW's 4 reads and 3 writes in place, on a given number of threads.

Python threads call C loops, compiled on the spot (`cc`, or $CC), on slices of torch tensors. Without a compiler copy
and triad are torch's own operations. The AdamW pattern is left out then, as no single operation of torch has it.
"""

import ctypes
import functools
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .rounds import Variant, interleave
from .timers import HostTimer

SOURCE = """
#define ARGS float *restrict p, const float *restrict g, float *restrict m, float *restrict v, long n
void copy(ARGS) { (void)m; (void)v; for (long i = 0; i < n; ++i) p[i] = g[i]; }
void triad(ARGS) { (void)v; for (long i = 0; i < n; ++i) p[i] = g[i] + 0.5f * m[i]; }
void adamw(ARGS) {
  for (long i = 0; i < n; ++i) {
    p[i] = 0.5f * p[i] + g[i];
    m[i] = 0.5f * m[i] + g[i];
    v[i] = 0.5f * v[i] + g[i];
  }
}
"""
# Plain stores, also in copy, which the compiler would turn into memcpy.
FLAGS = ("-O3", "-march=native", "-fno-tree-loop-distribute-patterns", "-shared", "-fPIC")
# Bytes per element: as STREAM counts them, and with the cache line that a store to unread memory fetches first.
BYTES = {"copy": (8, 12), "triad": (12, 16), "adamw": (28, 28)}


@functools.lru_cache(maxsize=1)
def _compile() -> ctypes.CDLL | None:
    """Compiles the loops. Returns None without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "stream.c"), Path(folder, "stream.so")
        source.write_text(SOURCE)
        try:
            command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(source), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return ctypes.CDLL(str(target))


def _c_loops(
    library: ctypes.CDLL, tensors: list[torch.Tensor], pool: ThreadPoolExecutor, threads: int
) -> dict[str, Callable]:
    numel = tensors[0].numel()
    starts = [numel * i // threads // 16 * 16 for i in range(threads)]  # 16 floats: a cache line
    slices = list(zip(starts, [*starts[1:], numel]))

    def whole(function) -> None:
        def part(bounds) -> None:
            begin, end = bounds
            function(
                *(ctypes.c_void_p(tensor.data_ptr() + 4 * begin) for tensor in tensors), ctypes.c_long(end - begin)
            )

        list(pool.map(part, slices))  # ctypes releases the GIL

    return {name: functools.partial(whole, getattr(library, name)) for name in BYTES}


def _torch_loops(tensors: list[torch.Tensor]) -> dict[str, Callable]:
    p, g, m, _ = tensors
    return {"copy": lambda: p.copy_(g), "triad": lambda: torch.add(g, m, alpha=0.5, out=p)}


def measure(threads: int, numel: int = 100_000_000, repetitions: int = 15) -> dict:
    """Measures the speed of each pattern: medians over rounds in random order. ``numel``: floats in each of four
    arrays.
    """
    tensors = [torch.full((numel,), 1.0 + i) for i in range(4)]
    library = _compile()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(threads) as pool:
        loops = _c_loops(library, tensors, pool, threads) if library else _torch_loops(tensors)
        variants = [Variant(name, "loop", loop) for name, loop in loops.items()]
        interleave(variants, HostTimer(), time.monotonic(), repetitions, repetitions, rarest=1)
    seconds = {variant.name: statistics.median(variant.seconds) for variant in variants}
    torch.set_num_threads(threads_before)
    result = {
        "method": "C loops" if library else "torch operations",
        "threads": threads,
        "numel": numel,
        "repetitions": repetitions,
    }
    for name, (counted, moved) in BYTES.items():
        per_second = numel / seconds[name] / 1e9 if name in seconds else None
        result[name] = per_second and {
            "gb_per_s": round(counted * per_second, 2),
            "traffic_gb_per_s": round(moved * per_second, 2),
        }
    return result
