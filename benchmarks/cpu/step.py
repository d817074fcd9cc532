"""Time of a whole optimizer step on the CPU: every policy and instruction set, beside torch's steps and eager masks.

One process a thread count. In it all variants step the same parameters, gradients and moments in turn, in a random
order each round, so that whatever else the machine does meets all alike. A variant's ratio is the median over rounds
of its time over that of torch's unmasked fused step in the same round.
"""

import functools
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

import graddrop_kernels as gk
from graddrop_kernels.backends import cpu

from ..common import machine
from ..render.__main__ import step_detail
from . import bandwidth

BASELINE = "torch fused"
TORCH = {BASELINE: {"fused": True}, "torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HYPERS = {"lr": 1e-6, "weight_decay": 0.01}  # small, so that the parameters hardly move over thousands of steps
LAYERS = 25  # of 16 tensors each: 400 tensors
P = 0.2
EPOCHS = 5  # of GradDropEpoch, measured in the middle one
ALL_STREAMS = 7  # of memory: read p, g, m, v; write p, m, v
NO_GRAD_STREAMS = 6  # a dropped block whose gradient counts as 0
SLOW = 4.0  # variants slower than this many baseline steps run only in every second to fifth round


@dataclass
class Tensors:
    """Parameters with gradients and warm moments that all variants share: one set each would not fit into memory."""

    named: list[tuple[str, torch.nn.Parameter]]
    moments: list[tuple[torch.Tensor, torch.Tensor]]
    blocks: list[str]  # of each parameter

    @property
    def numel(self) -> int:
        return sum(param.numel() for _, param in self.named)


def encoder_shapes(hidden: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, block, shape) of the 16 tensors of each of 25 XLM-R layers."""
    linear = {
        **{f"attention.{name}": (hidden, hidden) for name in ("self.query", "self.key", "self.value", "output.dense")},
        "intermediate.dense": (4 * hidden, hidden),
        "output.dense": (hidden, 4 * hidden),
    }
    found = []
    for block in (f"encoder.layer.{i}" for i in range(LAYERS)):
        for name, shape in linear.items():
            found += [(f"{block}.{name}.weight", block, shape), (f"{block}.{name}.bias", block, shape[:1])]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found += [(f"{block}.{name}.{kind}", block, (hidden,)) for kind in ("weight", "bias")]
    return found


def width(numel: int) -> int:
    """Of the layers that come nearest to ``numel`` parameters: 576 for 100M."""
    return max(8, round((numel / LAYERS / 12) ** 0.5 / 8) * 8)


def make_tensors(layout: str, numel: int, dtype: torch.dtype) -> Tensors:
    """``layout``: "one tensor", or "layers"."""
    shapes = [("weight", "weight", (numel,))] if layout == "one tensor" else encoder_shapes(width(numel))

    def draw(shape, scale: float) -> torch.Tensor:
        return torch.randn(shape).mul_(scale).to(dtype)

    tensors = Tensors([], [], [block for _, block, _ in shapes])
    for name, _, shape in shapes:
        param = torch.nn.Parameter(draw(shape, 0.02))
        param.grad = draw(shape, 1e-3)
        tensors.named.append((name, param))
        tensors.moments.append((draw(shape, 1e-3), draw(shape, 1e-3).square_()))  # not a fresh optimizer's zeros
    return tensors


def attach(optimizer: torch.optim.Optimizer, tensors: Tensors) -> torch.optim.Optimizer:
    """Gives the optimizer the shared moments and a step count of its own."""
    for (_, param), (exp_avg, exp_avg_sq) in zip(tensors.named, tensors.moments):
        optimizer.state[param] = {"step": torch.tensor(1000.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return optimizer


@dataclass(frozen=True)
class Case:
    """A policy as it is measured."""

    name: str
    policy: Callable  # named parameters -> policy
    epochs: tuple[int, ...] = (0,)  # one step in each before the measurement in the last of them
    masked: str | None = None
    mask_bits: int = 0  # a parameter, stored and read
    dropped_streams: int = ALL_STREAMS  # of memory, where it drops
    needs_blocks: bool = False

    def optimizer(self, tensors: Tensors, **arguments) -> gk.FusedGradDropAdamW:
        group = {"params": tensors.named, "blocks": list(dict.fromkeys(tensors.blocks)), "param_blocks": tensors.blocks}
        policy = self.policy(tensors.named)
        return gk.FusedGradDropAdamW([group], mask=policy, masked=self.masked, **HYPERS, **arguments)

    def enter_last_epoch(self, optimizer: gk.FusedGradDropAdamW) -> None:
        """One step an epoch, so that buckets of different ages are measured."""
        for epoch in self.epochs:
            optimizer.set_epoch(epoch)
            optimizer.step()


def _half_fixed(named) -> gk.FixedMask:
    return gk.FixedMask({name: torch.rand(param.shape) < 0.5 for name, param in named})


_epoch = functools.partial(gk.GradDropEpoch, EPOCHS)
_MIDDLE = tuple(range(EPOCHS // 2 + 1))
_FROZEN_BLOCKS = {"dropped_streams": 0, "needs_blocks": True}
CASES = (
    Case("mask=None", lambda named: None),
    Case("GradDrop", lambda named: gk.GradDrop(P)),
    Case("GradDrop, every epoch", lambda named: gk.GradDrop(P, every="epoch")),
    Case("GradDrop, frozen", lambda named: gk.GradDrop(P), masked="frozen"),
    Case("GaussianGradDrop", lambda named: gk.GaussianGradDrop(P)),
    Case("GradDropEpoch, bit-packed", lambda named: _epoch(storage="bitpacked"), _MIDDLE, mask_bits=3),
    Case("GradDropEpoch, recomputed", lambda named: _epoch(storage="recompute"), _MIDDLE),
    Case("GradDropEpoch, toggle", lambda named: _epoch(storage="recompute", toggle=True), _MIDDLE),
    Case("LayerGradDrop", lambda named: gk.LayerGradDrop(P), dropped_streams=NO_GRAD_STREAMS, needs_blocks=True),
    Case("GradFreeze, half frozen", lambda named: gk.GradFreeze(2), **_FROZEN_BLOCKS),
    Case("FixedMask, 50 %", _half_fixed, mask_bits=1),
)
SWEEP = tuple(  # the first has nothing frozen
    Case(f"{frozen} of {LAYERS} layers frozen", lambda named: gk.GradFreeze(LAYERS, blocks_per_epoch=1),
         (LAYERS - frozen - 1,), **_FROZEN_BLOCKS)
    for frozen in (0, 5, 10, 15, 20, 24)
)  # fmt: skip


@dataclass
class Variant:
    """One row of the results. ``kind``: "peer", "ours", "sweep", or "check" of the method by its original's twin."""

    name: str
    kind: str
    step: Callable[[], object]
    isa: str | None = None
    case: Case = Case("", lambda named: None)
    after: Callable[[], None] = lambda: None  # not timed
    active: Callable[[], float] = lambda: 1.0  # share of the parameters that the next step updates
    seconds: dict[int, float] = field(default_factory=dict)  # of the rounds in which it ran
    cpu_seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def run(self, number: int) -> None:
        if self.isa:
            cpu.select_isa(self.isa)
        self.shares.append(self.active())
        cpu_start, start = time.process_time(), time.perf_counter()
        self.step()
        self.seconds[number] = time.perf_counter() - start
        self.cpu_seconds.append(time.process_time() - cpu_start)
        self.after()


def torch_step(tensors: Tensors, name: str) -> Callable[[], object]:
    return attach(torch.optim.AdamW([param for _, param in tensors.named], **HYPERS, **TORCH[name]), tensors).step


def torch_peers(tensors: Tensors) -> list[Variant]:
    """torch's unmasked steps, the baseline first."""
    return [Variant(name, "peer", torch_step(tensors, name)) for name in TORCH]


def eager_peers(tensors: Tensors) -> list[Variant]:
    """GradDrop as one writes it: draw the mask, multiply, torch's fused step. Gradients are restored, untimed."""
    params = [param for _, param in tensors.named]
    grads = [param.grad.clone() for param in params]

    def restore() -> None:
        for param, grad in zip(params, grads):
            param.grad.copy_(grad)

    def masked_step(keep: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        update = torch_step(tensors, BASELINE)

        def step() -> None:
            for param in params:
                param.grad.mul_(keep(param.grad)).div_(1 - P)
            update()

        return step

    bernoulli = masked_step(lambda grad: torch.empty_like(grad).bernoulli_(1 - P))
    rand = masked_step(lambda grad: torch.rand_like(grad) >= P)
    return [
        Variant("bernoulli_ mask, multiply, torch fused", "peer", bernoulli, after=restore),
        Variant("torch.rand mask, multiply, torch fused", "peer", rand, after=restore),
    ]


def ours(case: Case, kind: str, tensors: Tensors, isas: list[str], suffix: str = "") -> list[Variant]:
    """The case on every instruction set, by one optimizer."""
    optimizer = attach(case.optimizer(tensors, backend="cpu"), tensors)
    case.enter_last_epoch(optimizer)
    by_share = case.dropped_streams != ALL_STREAMS
    active = (lambda: optimizer.active_fraction()[0]) if by_share else (lambda: 1.0)
    return [Variant(case.name + suffix, kind, optimizer.step, isa, case, active=active) for isa in isas]


def twins(tensors: Tensors, isa: str) -> list[Variant]:
    """Two of the steps on tensors of their own: how far their ratios are off is the error of sharing, and noise."""
    graddrop = next(case for case in CASES if case.name == "GradDrop")
    suffix = ", own tensors"
    baseline = Variant(BASELINE + suffix, "check", torch_step(tensors, BASELINE))
    return [baseline, *ours(graddrop, "check", tensors, [isa], suffix)]


def interleave(variants: list[Variant], deadline: float, min_rounds: int, max_rounds: int, label: str) -> None:
    """Runs all variants in rounds, in random order, until the deadline (time.monotonic); the first is the baseline."""
    for number in (-2, -1):  # warm-up: caches of the optimizers, pages, threads
        for variant in variants:
            variant.run(number)
    unit = SLOW * variants[0].seconds[-1]
    every = [min(5, min_rounds, 1 + int(variant.seconds[-1] / unit)) for variant in variants]
    every[0] = 1
    for variant in variants:
        variant.seconds.clear(), variant.cpu_seconds.clear(), variant.shares.clear()
    gc.collect()
    gc.disable()
    number = 0
    while number < min_rounds or (time.monotonic() < deadline and number < max_rounds):
        turn = [variant for index, variant in enumerate(variants) if (number - index) % every[index] == 0]
        for variant in random.sample(turn, len(turn)):
            variant.run(number)
        number += 1
        if number % 10 == 0:
            print(f"{label}: {number} rounds, {max(0, deadline - time.monotonic()):.0f} s left", file=sys.stderr)
    gc.enable()


def summarize(variants: list[Variant], numel: int, itemsize: int) -> list[dict]:
    """One row a variant: medians, 20th and 80th percentiles, and the bytes that the masked update must move.

    Bytes, of peers too: 7 streams of what is active, the bits of stored masks, of dropped blocks 6 streams or none.
    """
    rows = []
    for variant in variants:
        row = {"name": variant.name, "kind": variant.kind, "isa": variant.isa, "repetitions": len(variant.seconds)}
        ratios = [seconds / variants[0].seconds[number] for number, seconds in variant.seconds.items()]
        for key, values in {"seconds": list(variant.seconds.values()), "ratio": ratios}.items():
            row[key] = statistics.median(values)
            row[f"{key}_p20"], row[f"{key}_p80"] = np.percentile(values, (20, 80)).tolist()
        active = statistics.fmean(variant.shares)
        streams = ALL_STREAMS * active + variant.case.dropped_streams * (1 - active)
        moved = itemsize * streams + variant.case.mask_bits / 8
        row |= {"cpu_seconds": statistics.median(variant.cpu_seconds), "ns_per_param": row["seconds"] / numel * 1e9}
        row |= {"active": active, "bytes_per_param": moved, "gb_per_s": moved * numel / row["seconds"] / 1e9}
        rows.append(row)
    return rows


def measure(layout: str, numel: int, dtype: str, isas: list[str], cases, deadline: float, quick: bool) -> dict:
    """One configuration, on the threads that are set."""
    load, threads = machine.Load(), torch.get_num_threads()
    torch.manual_seed(random.randrange(2**31))
    tensors = make_tensors(layout, numel, DTYPES[dtype])
    variants = torch_peers(tensors) + eager_peers(tensors)
    cpu.select_isa(isas[0])
    for case in cases:
        if layout == "layers" or not case.needs_blocks:
            variants += ours(case, "sweep", tensors, isas[:1]) if case in SWEEP else ours(case, "ours", tensors, isas)
    variants += twins(make_tensors(layout, numel, DTYPES[dtype]), isas[0])
    rounds = (2, 2) if quick else (5, 1000)
    interleave(variants, deadline, *rounds, f"{dtype}, {layout}, {threads} threads")
    rows = summarize(variants, tensors.numel, DTYPES[dtype].itemsize)
    config = {"threads": threads, "layout": layout, "numel": tensors.numel, "tensors": len(tensors.named)}
    return config | {"isas": isas, "load": load.report(), "rows": rows}


def measure_threads(threads: int, dtype: str, isas: list[str], numel: int, seconds: float, quick: bool) -> dict:
    """All configurations of one thread count: called in a process of its own."""
    torch.set_num_threads(threads)
    start = time.monotonic()
    run = {"bandwidth": bandwidth.measure(threads, min(numel, 100_000_000), 3 if quick else 15), "configs": []}
    fast = [isa for isa in isas if isa != "portable"] or isas
    # (layout, parameters, instruction sets, cases, share of the time by the end)
    plans = [("layers", numel, fast, CASES + SWEEP, 0.55), ("one tensor", numel, fast, CASES, 0.95)]
    if fast != isas:  # portable is slow, so on fewer parameters
        plans.append(("layers", numel // 10, ["portable"], CASES, 1.0))
    for layout, size, on, cases, share in plans:
        config = measure(layout, size, dtype, on, cases, start + share * seconds, quick)
        run["configs"].append(config)
        print(f"\n{step_detail(dtype, run, config)}\nLoad of the machine: {config['load']}", flush=True)
    return run


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--isas", nargs="+", choices=cpu.ISAS, help="default: all of this processor and build")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for each dtype, setup included")
    options = parser.parse_args()
    isas = options.isas or list(cpu.available_isas())
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    numel = min(options.numel, 200_000) if options.quick else options.numel
    seconds = 0 if options.quick else options.budget / len(options.threads)
    for dtype in options.dtypes:
        load, runs = machine.Load(), []
        for threads in options.threads:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                job = pool.submit(measure_threads, threads, dtype, isas, numel, seconds, options.quick)
                runs.append(job.result())
        results = {"dtype": dtype, "budget": options.budget, "load": load.report(), "runs": runs}
        print(machine.write(f"step_cpu_{dtype}", options, results))


if __name__ == "__main__":
    main()
