"""`python -m graddrop_kernels bench`: torch's fused AdamW beside ours on this machine, by policy and dtype.

Everything steps the same warm tensors in turn, in a random order each round; a ratio is the median over rounds of a
time over torch's in the same round. On a GPU the times are those of CUDA events. It is kept busy before each step for
longer than the host took to queue the last one. The repository's benchmarks/ measure more, with more care.
"""

import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from .. import __version__, backends
from ..backends import cpu
from ..optimizer import FusedGradDropAdamW
from ..policies import FixedMask, Policy
from ..policies.paper import METHODS

_MODES = {  # dtypes of parameters and gradients, of moments
    "float32": (torch.float32, torch.float32),
    "bfloat16, float32 moments": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
_SIZES = {"quick": (2, 32), "cpu": (12, 384), "cuda": (24, 1024)}  # transformer layers, width
_SECONDS = {"quick": 0.0, "cpu": 25.0, "cuda": 10.0}  # of rounds for each mode
_ROUNDS = 3  # at least
_BASELINE = "torch fused"
_EAGER = "mask drawn by torch, torch fused"
# Small, so that the parameters hardly move over many steps.
_HYPERS: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.01}
_P = 0.2
_SPIN = (2e-3, 0.1)  # seconds: before the first timed step, and at most; 1000 or so queued launches make the host wait
_IN_EPOCH_0 = {"gradfreeze-topdown": ("GradFreeze, half frozen", 2)}  # (name, epochs), where the epoch makes the cost


def bench(device: str | torch.device | None = None, quick: bool = False) -> int:
    """Measures, and prints the table.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; default: the GPU if torch sees one.
        quick: tiny tensors and few rounds: shows that it runs, the figures mean nothing.

    Returns:
        0, or 1 where no compiled backend can step such tensors, with the reasons.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = "quick" if quick else device.type if device.type in _SIZES else "cpu"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {"quick": quick, "machine": _machine(device), "modes": []}
    for mode in _MODES:
        backend = backends.select("auto", device, *_MODES[mode]).name
        if backend == "reference":
            fast = [row for row in backends.BACKENDS if row.automatic and row.name != "reference"]
            reasons = "; ".join(f"{row.name} {row.misfit(device, *_MODES[mode])}" for row in fast)
            print(f"nothing to measure on {device.type}: {reasons}", file=sys.stderr)
            return 1
        on_device: AbstractContextManager[None] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with on_device, warnings.catch_warnings():  # events and spinning belong to the current device
            warnings.filterwarnings("ignore", message="two optimizers are stepped in turn")  # on purpose
            found["modes"].append(_measure(mode, backend, device, kind))
    print(_table(found))
    return 0


def _machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu.processor()
    threads = None if on_gpu else torch.get_num_threads()
    versions = {"torch": torch.__version__, "graddrop": __version__}
    return {"device": device.type, "name": name, "threads": threads, **versions}


@dataclass
class _Tensors:
    """Parameters with gradients, and warm moments that everything steps in turn."""

    named: list[tuple[str, torch.nn.Parameter]]
    blocks: list[str]
    moments: list[tuple[torch.Tensor, torch.Tensor]]

    def attach(self, optimizer: torch.optim.Optimizer, moment_dtype: torch.dtype) -> torch.optim.Optimizer:
        for (_, param), pair in zip(self.named, self.moments):
            exp_avg, exp_avg_sq = (moment.to(moment_dtype) for moment in pair)  # the same tensors where the dtype is
            step = torch.tensor(1000.0, device=param.device)
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer


def _make_tensors(mode: str, device: torch.device, layers: int, width: int) -> _Tensors:
    """16 tensors a layer, as in XLM-R."""
    matrices = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    shapes = [shape for matrix in matrices for shape in (matrix, matrix[:1])] + [(width,)] * 4
    dtype, moment_dtype = _MODES[mode]
    tensors = _Tensors([], [], [])

    def draw(shape: tuple[int, ...], scale: float, of: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=of).mul_(scale)

    for layer in range(layers):
        for number, shape in enumerate(shapes):
            param = torch.nn.Parameter(draw(shape, 0.02, dtype))
            param.grad = draw(shape, 1e-3, dtype)
            tensors.named.append((f"layer.{layer}.{number}", param))
            tensors.blocks.append(f"layer.{layer}")
            tensors.moments.append((draw(shape, 1e-3, moment_dtype), draw(shape, 1e-3, moment_dtype).square_()))
    return tensors


@dataclass
class _Entry:
    name: str
    step: Callable[[], object]
    after: Callable[[], object] = lambda: None  # not timed
    spin: float = _SPIN[0]  # seconds for which the GPU is kept busy before the next step
    seconds: list[float] = field(default_factory=list)


@lru_cache(maxsize=1)  # 300M bits take seconds, and the modes can share them
def _half(shapes: tuple[tuple[str, torch.Size], ...]) -> FixedMask:
    return FixedMask({name: torch.randint(0, 2, shape, dtype=torch.bool) for name, shape in shapes})


def _policies(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, Policy | None]:
    half = _half(tuple((name, param.shape) for name, param in named))
    found: dict[str, Policy | None] = {}
    for key, method in METHODS.items():
        if method.timed:
            name, epochs = _IN_EPOCH_0.get(key, (method.name, 5))
            found[name] = method(epochs, _P)
    return found | {"FixedMask, 50 %": half}


def _entries(tensors: _Tensors, mode: str, backend: str) -> list[_Entry]:
    """torch's step first. torch keeps moments in the parameters' dtype, so bfloat16 ones where ours may be float32."""
    dtype, moment_dtype = _MODES[mode]
    params = [param for _, param in tensors.named]
    fused = tensors.attach(torch.optim.AdamW(params, fused=True, **_HYPERS), dtype)
    grads: list[Any] = [param.grad for param in params]
    saved = [grad.clone() for grad in grads]

    def masked_by_hand() -> None:
        for grad in grads:
            grad.mul_(torch.empty_like(grad).bernoulli_(1 - _P)).div_(1 - _P)
        fused.step()

    def restore() -> None:
        torch._foreach_copy_(grads, saved)

    entries = [_Entry(_BASELINE, fused.step), _Entry(_EAGER, masked_by_hand, restore)]
    for name, policy in _policies(tensors.named).items():
        blocks = {"blocks": list(dict.fromkeys(tensors.blocks)), "param_blocks": tensors.blocks}
        optimizer = FusedGradDropAdamW(
            [{"params": tensors.named, **blocks}], mask=policy, backend=backend,
            moment_dtype=moment_dtype if moment_dtype != dtype else None, **_HYPERS,
        )  # fmt: skip
        tensors.attach(optimizer, moment_dtype)
        optimizer.set_epoch(0)
        entries.append(_Entry(name, optimizer.step))
    return entries


def _time(entry: _Entry, device: torch.device) -> float:
    """Makes a step. Returns its seconds."""
    if device.type != "cuda":
        begin = time.perf_counter()
        entry.step()
        return time.perf_counter() - begin
    cycles = int(entry.spin * _cycles_per_second(device))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    begin = time.perf_counter()
    entry.step()
    on_host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    entry.spin = min(_SPIN[1], 1.5 * on_host + 1e-4)
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


@lru_cache(maxsize=8)
def _cycles_per_second(device: torch.device) -> float:
    """Returns the speed of the clock by which a GPU, the current one, spins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first raises the clock
        start.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return 20_000_000 / milliseconds * 1e3


def _measure(mode: str, backend: str, device: torch.device, kind: str) -> dict[str, Any]:
    tensors = _make_tensors(mode, device, *_SIZES[kind])
    entries = _entries(tensors, mode, backend)
    for entry in entries + entries:  # code is compiled, tables are made, and the host's time becomes known
        _time(entry, device), entry.after()
    deadline = time.monotonic() + _SECONDS[kind]
    rounds = 0
    while rounds < _ROUNDS or (time.monotonic() < deadline and rounds < 200):
        for entry in random.sample(entries, len(entries)):
            entry.seconds.append(_time(entry, device))
            entry.after()
        rounds += 1
        print(f"\r{mode}: {rounds} rounds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for entry in entries:
        ratios = [own / torchs for own, torchs in zip(entry.seconds, entries[0].seconds)]
        seconds = statistics.median(entry.seconds)
        rows.append({"name": entry.name, "seconds": seconds, "ratio": statistics.median(ratios)})
    numel = sum(param.numel() for _, param in tensors.named)
    size = {"numel": numel, "tensors": len(tensors.named)}
    return {"mode": mode, "backend": backend, **size, "rounds": rounds, "rows": rows}


def _table(found: dict[str, Any]) -> str:
    """A row a variant, a column a mode: time over torch's fused step, and milliseconds."""
    modes, machine = found["modes"], found["machine"]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    lines = [f"{machine['name']}{threads}, torch {machine['torch']}, graddrop_kernels {machine['graddrop']}"]
    lines += [f"{modes[0]['numel'] / 1e6:.1f}M parameters in {modes[0]['tensors']} tensors; time / torch fused (ms)"]
    lines += ["QUICK RUN: the figures mean nothing"] if found["quick"] else []
    lines += ["", f"{'':<34}" + "".join(f"{mode['mode']:>28}" for mode in modes)]
    lines += [f"{'backend of ours':<34}" + "".join(f"{mode['backend']:>28}" for mode in modes)]
    for number, row in enumerate(modes[0]["rows"]):
        own = [mode["rows"][number] for mode in modes]
        figures = [f"{each['ratio']:.2f} ({each['seconds'] * 1e3:.3f})" for each in own]
        lines.append(f"{row['name']:<34}" + "".join(f"{figure:>28}" for figure in figures))
    return "\n".join(lines)
