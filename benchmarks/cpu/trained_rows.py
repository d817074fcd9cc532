"""What a step of some rows costs: 2,000 of the 250,000 rows of an embedding of width 768, in float32.

All variants step one weight with one gradient. "Restored": as one does it without TrainRows, a dense step after which
the other rows are copied back, and their moments set to 0. "One row" shows what is left when there is nothing to step.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from graddrop_kernels import FusedGradDropAdamW, TrainRows
from graddrop_kernels.backends import cpu

from ..common.machine import Load
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, interleave, summarize
from ..common.timers import HostTimer

SHAPE, TRAINED = (250_000, 768), 2000


def restored(weight: torch.nn.Parameter, first: int) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    optimizer = torch.optim.AdamW([weight], fused=True)
    others = weight.detach()[:first].clone()

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            weight[:first].copy_(others)
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][name][:first].zero_()

    return optimizer, step


def variants_of(weight: torch.nn.Parameter, trained: int) -> list[tuple[Variant, torch.optim.Optimizer]]:
    size = len(weight)
    masks: dict[str, Any] = {
        "mask=None": None,
        f"TrainRows, the last {trained:,} rows": TrainRows({"weight": slice(size - trained, None)}),
        f"TrainRows, {trained:,} rows, none beside another": TrainRows({"weight": range(0, size, size // trained)}),
        "TrainRows, one row": TrainRows({"weight": [0]}),
    }
    torchs = torch.optim.AdamW([weight], fused=True)
    found = [(Variant("torch fused", "peer", torchs.step), torchs)]
    optimizer, step = restored(weight, size - trained)
    found.append((Variant("torch fused, other rows restored", "peer", step), optimizer))
    for name, mask in masks.items():
        ours = FusedGradDropAdamW([("weight", weight)], mask=mask, seed=len(found))  # of its own, as they share a name
        found.append((Variant(name, "ours", ours.step), ours))
    return found


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    (state,) = optimizer.state.values()
    return state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=90, metavar="SECONDS", help="of the rounds")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    torch.set_num_threads(options.threads)
    load, (rows, width) = Load(), (500, 8) if options.quick else SHAPE
    weight = torch.nn.Parameter(torch.randn(rows, width))
    weight.grad = torch.randn(rows, width)
    made = variants_of(weight, 10 if options.quick else TRAINED)
    rounds, seconds = ((2, 2), 0.0) if options.quick else ((20, 1000), options.budget)
    interleave([each for each, _ in made], HostTimer(), time.monotonic() + seconds, *rounds, 3, "rows")
    found = summarize([each for each, _ in made], FIFTHS, lambda variant, row: {})
    for row, (_, optimizer) in zip(found, made):
        row["moment_bytes"] = moment_bytes(optimizer)
    shape = {"shape": [rows, width], "threads": options.threads}
    print(write("trained_rows", options, {"load": load.report(), **shape, "rows": found}))


if __name__ == "__main__":
    main()
