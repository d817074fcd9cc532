"""Memory of the optimizers: what they keep between steps, counted and computed, and what a step takes for itself.

Kept are AdamW's two moments and a step count per tensor, and of the policies only the bits of stored masks: counted in
tensor storages that the optimizer keeps alive, beside tables of addresses. A step's own memory is the growth of the
process's resident memory at its peak (Linux). Exits with 1 when an optimizer keeps other bytes than are computed.
"""

import functools
import sys
from collections.abc import Callable

import torch

from graddrop_kernels.masks.bitmask import num_words

from ..common.cases import CASES, HYPERS, Case
from ..common.kept import kept_bytes
from ..common.machine import Load
from ..common.resident import peak_growth
from ..common.results import arguments, write
from ..common.shapes import encoder
from ..common.tensors import Tensors, make_tensors

# (dtype of parameters, of moments, options); None: moments in the parameters' dtype
MODES = (
    ("float32", None, {}),
    ("bfloat16", None, {}),
    ("bfloat16", None, {"stochastic_rounding": True}),
    ("bfloat16", torch.float32, {}),
    ("bfloat16", torch.float32, {"master_weights": True}),
)
TORCH = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}
OPTIONS = {"stochastic_rounding": ", rounded stochastically", "master_weights": " and masters"}
TABLE = 1024  # bytes per tensor for addresses and keys; more would be a mask in disguise


def computed_bytes(tensors: Tensors, moments: torch.dtype, mask_bits: int, masters: bool = False) -> int:
    """Computes the bytes of two moments, a float32 step count per tensor, mask bits in words of 32, and float32
    masters.
    """
    sizes, kept = [param.numel() for _, param in tensors.named], 2 * moments.itemsize + 4 * masters
    return sum(kept * numel + 4 + 4 * mask_bits * num_words(numel) for numel in sizes)


def measure(
    name: str, kind: str, optimizer: torch.optim.Optimizer, step: Callable, tensors: Tensors, case: Case | None
) -> dict:
    """Measures an optimizer. ``step`` is its first step, which creates the state."""
    param = tensors.named[0][1]
    numel = tensors.numel
    first = peak_growth(step)
    later = [peak_growth(optimizer.step) for _ in range(3)]
    moments = optimizer.state[param]["exp_avg"].dtype if optimizer.state[param] else param.dtype
    (kept, tables), mask_bits = kept_bytes(optimizer, tensors.params), case.mask_bits if case else 0
    group = optimizer.param_groups[0]
    option = "".join(text for option, text in OPTIONS.items() if group.get(option))
    computed = computed_bytes(tensors, moments, mask_bits, bool(group.get("master_weights")))
    return {
        "name": name,
        "kind": kind,
        "dtype": str(param.dtype).removeprefix("torch."),
        "moment_dtype": str(moments).removeprefix("torch.") + option,
        "mask_bits": mask_bits,
        "kept_bytes": kept,
        "computed_bytes": computed,
        "table_bytes_per_tensor": tables / len(tensors.named),
        "kept_per_param": kept / numel,
        "computed_per_param": computed / numel,
        "first_step_peak_per_param": first and first / numel,
        "step_peak_per_param": None if None in later else sorted(later)[1] / numel,
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--numel", type=int, default=20_000_000, help="parameters")
    options = parser.parse_args()
    load, rows = Load(), []
    for dtype, moment_dtype, more in MODES:
        numel = min(options.numel, 300_000) if options.quick else options.numel
        tensors = make_tensors(encoder(numel), dtype)
        tensors.moments.clear()
        for name, implementation in TORCH.items() if moment_dtype is None and not more else ():
            peer = torch.optim.AdamW(tensors.params, **HYPERS, **implementation)
            rows.append(measure(name, "peer", peer, peer.step, tensors, None))
            show(rows[-1])
        for case in CASES:
            ours = case.optimizer(tensors, moment_dtype=moment_dtype, **more)
            first_step = functools.partial(case.enter_last_epoch, ours)
            rows.append(measure(case.name, "ours", ours, first_step, tensors, case))
            show(rows[-1])
    results = {"numel": tensors.numel, "tensors": len(tensors.named), "load": load.report(), "rows": rows}
    print(write("memory", options, results))
    wrong = [row for row in rows if row["kept_bytes"] != row["computed_bytes"] or row["table_bytes_per_tensor"] > TABLE]
    for row in wrong:
        print(f"{row['name']} in {row['dtype']} keeps more or less than is computed", file=sys.stderr)
    return 1 if wrong else 0


def show(row: dict) -> None:
    peak = "unknown" if row["step_peak_per_param"] is None else f"{row['step_peak_per_param']:.3f}"
    kept = f"keeps {row['kept_per_param']:.4f} bytes a parameter (computed {row['computed_per_param']:.4f})"
    dtypes = f"{row['dtype']:>9}/{row['moment_dtype']:<33}"
    print(f"{dtypes}{row['name']:<28} {kept}, a step takes {peak} more", flush=True)


if __name__ == "__main__":
    sys.exit(main())
