"""Costs that could grow: with the patterns of gradients, the strides, the epochs and the groups. Beside torch's fused
AdamW in the same rounds.

- experts: 800 tensors of 64 elements, of which others have gradients in every step.
- channels_last: a convolution's weight, contiguous and under channels_last.
- epochs: a step after 100 to 12,000 epochs of one step each, and the history that a group keeps of them.
- groups: an optimizer of 800 groups, the first look after a load, and 300 groups added one by one.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, LayerGradDrop
from graddrop_kernels.backends import cpu

from ..common.cases import CASE, CASES, Case, make_optimizer
from ..common.machine import Load
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, interleave, paired, spread, summarize
from ..common.tensors import make_tensors
from ..common.timers import HostTimer

TENSORS, SHARES = 800, (1.0, 0.5, 0.25, 0.05)
CHANNELS = (512, 512, 3, 3)
EPOCHS = (100, 1000, 3000, 12000)
GROUPS, ADDED = 800, 300
TORCH = {"fused": True}
LAYERS = LayerGradDrop(0.5, layers=["layers.*"])

Named = list[tuple[str, torch.nn.Parameter]]


def named(count: int, size: int) -> Named:
    return [(f"layers.{i // 8}.weight{i % 8}", torch.nn.Parameter(torch.randn(size))) for i in range(count)]


def alternating(
    name: str, kind: str, count: int, share: float, make: Callable[[Named], torch.optim.Optimizer]
) -> Variant:
    """A step of the parameters to which each round gives gradients anew. The first round gives one to each."""
    params = named(count, 64)
    optimizer, dice = make(params), random.Random(0)

    def give() -> None:
        everyone = not optimizer.state
        for _, param in params:
            param.grad = torch.ones(64) if everyone or dice.random() < share else None

    return Variant(name, kind, optimizer.step, before=give)


def experts(count: int, share: float) -> list[Variant]:
    def ours(mask: Any) -> Callable[[Named], torch.optim.Optimizer]:
        return lambda params: FusedGradDropAdamW(params, mask=mask)

    return [
        alternating("torch fused", "peer", count, share, lambda params: torch.optim.AdamW(params, **TORCH)),
        alternating("torch for-loop", "peer", count, share, lambda params: torch.optim.AdamW(params, foreach=False)),
        alternating("mask=None", "ours", count, share, ours(None)),
        alternating("GradDrop", "ours", count, share, ours(GradDrop())),
    ]


def strided(case: Case | None, shape: tuple[int, ...], memory_format: torch.memory_format) -> Variant:
    """A step of one weight; of torch's fused AdamW without a case."""
    tensors = make_tensors([("layers.0.weight", "layers.0", shape)], "float32")
    ((name, param),) = tensors.named
    param.data, param.grad = (each.to(memory_format=memory_format) for each in (param.data, param.grad))
    tensors.moments = [tuple(moment.to(memory_format=memory_format) for moment in tensors.moments[0])]
    if case is None:
        return Variant("torch fused", "peer", torch.optim.AdamW([param], **TORCH).step)
    optimizer = make_optimizer(case, tensors, "cpu")
    case.enter_last_epoch(optimizer)
    return Variant(case.name, "ours", optimizer.step)


def rows_of(variants: list[Variant], work: str) -> list[dict]:
    return [{"work": work, **row} for row in summarize(variants, FIFTHS, lambda variant, row: {})]


def channels_last(options: Any, timer: HostTimer, deadline: float, rounds: tuple[int, int]) -> list[dict]:
    """A row per method. ``over_contiguous``: its time under channels_last over its own when contiguous."""
    shape = (8, 8, 3, 3) if options.quick else CHANNELS
    cases = [None, *(case for case in CASES if not case.needs_blocks or case is CASE["LayerGradDrop"])]
    pairs = [
        [strided(case, shape, order) for order in (torch.channels_last, torch.contiguous_format)] for case in cases
    ]
    interleave([pairs[0][1], pairs[0][0], *sum(pairs[1:], [])], timer, deadline, *rounds, 5, "channels_last")
    found = []
    for own, twin in pairs:
        row = {"name": own.name, "kind": own.kind, **spread("seconds", own.seconds, FIFTHS)}
        found.append(row | spread("over_contiguous", paired(own, twin), FIFTHS))
    return found


def epochs(last: int) -> list[dict]:
    """A row per policy and number of epochs: the shortest of the steps around it, and the bytes of the history."""
    found = []
    for name, mask in (("GradDrop, every epoch", GradDrop(every="epoch")), ("GradDropEpoch", GradDropEpoch(100))):
        param = torch.nn.Parameter(torch.ones(10))
        param.grad = torch.ones(10)
        optimizer = FusedGradDropAdamW([("weight", param)], mask=mask, masked="frozen")
        seconds = []
        for epoch in range(last):
            optimizer.set_epoch(epoch)
            began = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - began)
        for count in (count for count in EPOCHS if count <= last):
            history = len(optimizer.param_groups[0]["epoch_history"]) if count == last else None
            found.append({"name": name, "epochs": count, "seconds": min(seconds[count - 50 : count]), "bytes": history})
    return found


Make = Callable[[list], Any]  # an optimizer of groups
MAKERS: dict[str, Make] = {
    "torch": lambda groups: torch.optim.AdamW(groups, **TORCH),
    "GradDrop": lambda groups: FusedGradDropAdamW(groups, mask=GradDrop()),
    "LayerGradDrop(layers=)": lambda groups: FusedGradDropAdamW(groups, mask=LAYERS),
}


def making(make: Make, params: Named) -> Callable[[], object]:
    return lambda: make([{"params": [pair]} for pair in params])


def loading(make: Make, params: Named) -> Callable[[], object]:
    optimizer = make([{"params": [pair]} for pair in params])

    def load() -> None:
        optimizer.load_state_dict(optimizer.state_dict())
        if isinstance(optimizer, FusedGradDropAdamW):
            optimizer.active_fraction()

    return load


def adding(make: Make, params: Named) -> Callable[[], object]:
    optimizer = make([{"params": params[:1]}])
    return lambda: [optimizer.add_param_group({"params": [pair]}) for pair in params[1:]]


def groups(count: int, added: int) -> list[dict]:
    """A row per optimizer and piece of work: the shortest time of three."""
    works = ((f"{count} groups", making, count), (f"load of {count} groups", loading, count))
    found = []
    for name, make in MAKERS.items():
        for title, work, size in (*works, (f"{added} groups added", adding, added)):
            seconds = []
            for _ in range(3):
                ready = work(make, named(size, 4))
                began = time.perf_counter()
                ready()
                seconds.append(time.perf_counter() - began)
            found.append({"work": title, "name": name, "seconds": min(seconds)})
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=90, metavar="SECONDS", help="of the rounds")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    torch.set_num_threads(1)
    load, timer, found = Load(), HostTimer(), []
    rounds, seconds = ((2, 2), 0.0) if options.quick else ((30, 1000), options.budget / (len(SHARES) + 1))
    count = 40 if options.quick else TENSORS
    for share in SHARES:
        variants = experts(count, share)
        interleave(variants, timer, time.monotonic() + seconds, *rounds, 5, f"experts {share}")
        found += rows_of(variants, f"{share:.0%} of {count} tensors")
    results = {
        "load": None, "experts": found,
        "channels_last": channels_last(options, timer, time.monotonic() + seconds, rounds),
        "epochs": epochs(EPOCHS[0] if options.quick else EPOCHS[-1]),
        "groups": groups(*((8, 4) if options.quick else (GROUPS, ADDED))),
    }  # fmt: skip
    results["load"] = load.report()
    print(write("growing_costs", options, results))


if __name__ == "__main__":
    main()
