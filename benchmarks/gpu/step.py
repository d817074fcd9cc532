"""Time of a whole optimizer step on the GPU: every policy, dtype and backend beside torch's step and other libraries'.

All variants of one configuration step the same parameters, gradients and moments in turn, in a random order each
round. A ratio is the median over rounds of a variant's time over that of torch's unmasked fused step in the same round.
The results are written anew after each configuration.
"""

import functools
import gc
import sys
import time
from dataclasses import dataclass, replace

import torch

import graddrop_kernels as gk
from graddrop_kernels.backends import BACKENDS

from ..common import machine
from ..common.peers import BASELINE, PEERS, Peer, table, torch_adamw, unavailable
from ..common.rounds import Variant, attempt, interleave, message, quartiles, summarize
from ..common.shapes import WORK, Named
from ..common.timers import GpuTimer, RehearsalTimer, copy_bandwidth, make_timer
from ..cpu.step import ALL_STREAMS, CASES, HYPERS, Case

MODES = {  # dtypes of parameters and gradients, of moments
    "float32": (torch.float32, torch.float32),
    "bfloat16, float32 moments": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
MEANINGS = ("reference", "exact")  # backends that define what is right, slowly
STEPS_BEFORE = 1000.0
FIRST_STEPS = 5


@dataclass
class GpuTensors:
    """Parameters with gradients and warm moments that all variants share."""

    named: list[tuple[str, torch.nn.Parameter]]
    blocks: list[str | None]
    moments: list[tuple[torch.Tensor, torch.Tensor]]
    kept_grads: list[torch.Tensor] | None = None

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [param for _, param in self.named]

    @property
    def device(self) -> torch.device:
        return self.named[0][1].device

    @property
    def numel(self) -> int:
        return sum(param.numel() for _, param in self.named)

    @functools.cached_property
    def torchs_moments(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """In the parameters' dtype, as torch keeps them."""
        return [tuple(moment.to(param.dtype) for moment in pair) for param, pair in zip(self.params, self.moments)]

    def twin(self) -> "GpuTensors":
        """The same values in tensors of its own."""
        named = []
        for name, param in self.named:
            copy = torch.nn.Parameter(param.detach().clone())
            copy.grad = param.grad.clone()
            named.append((name, copy))
        return GpuTensors(named, self.blocks, [tuple(moment.clone() for moment in pair) for pair in self.moments])

    def keep_grads(self) -> None:
        """Remembers the gradients for ``restore_grads``."""
        self.kept_grads = self.kept_grads or [param.grad.clone() for param in self.params]

    def restore_grads(self) -> None:
        """Undoes what a peer that masks has done to the gradients."""
        torch._foreach_copy_([param.grad for param in self.params], self.kept_grads)

    def attach(self, optimizer, dtype: torch.dtype, step_device: torch.device) -> torch.optim.Optimizer:
        """Gives the optimizer the shared moments of that dtype and step counts of its own."""
        pairs = self.moments if dtype == self.moments[0][0].dtype else self.torchs_moments
        for param, (exp_avg, exp_avg_sq) in zip(self.params, pairs):
            step = torch.tensor(STEPS_BEFORE, device=step_device)
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer


def make_tensors(shapes: list[Named], mode: str, device: torch.device) -> GpuTensors:
    """Random parameters, gradients and moments, never a fresh optimizer's zeros."""
    dtype, moment_dtype = MODES[mode]

    def draw(shape, scale: float, of: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=of, device=device).mul_(scale)

    tensors = GpuTensors([], [block for _, block, _ in shapes], [])
    for name, _, shape in shapes:
        param = torch.nn.Parameter(draw(shape, 0.02, dtype))
        param.grad = draw(shape, 1e-3, dtype)
        tensors.named.append((name, param))
        tensors.moments.append((draw(shape, 1e-3, moment_dtype), draw(shape, 1e-3, moment_dtype).square_()))
    return tensors


@functools.lru_cache(maxsize=1)  # packing half a billion bits on the CPU takes seconds, and the modes can share it
def _fixed_half(shapes: tuple) -> gk.FixedMask:
    return gk.FixedMask({name: torch.randint(0, 2, shape, dtype=torch.bool) for name, shape in shapes})


def _half(named) -> gk.FixedMask:
    return _fixed_half(tuple((name, tuple(param.shape)) for name, param in named))


GPU_CASES = tuple(replace(case, policy=_half) if case.name.startswith("FixedMask") else case for case in CASES)
CASE = {case.name: case for case in GPU_CASES}
FIXED = next(name for name in CASE if name.startswith("FixedMask"))
WITH_FIXED = "xlmr_large"  # a fixed mask is packed on the CPU, ten seconds for half a billion bits: on one work only


def backends_for(device: torch.device, mode: str) -> list[str]:
    """Those that can step such tensors here, fast ones only."""
    rows = [backend for backend in BACKENDS if backend.name not in MEANINGS]
    return [backend.name for backend in rows if backend.misfit(device, *MODES[mode]) is None]


def make_optimizer(case: Case, tensors: GpuTensors, backend: str, **options) -> gk.FusedGradDropAdamW:
    """The case with the shared moments. Policies of blocks leave what is outside the blocks dense."""
    groups = tensors.named
    if case.needs_blocks:
        inside = [i for i, block in enumerate(tensors.blocks) if block is not None]
        owners = [tensors.blocks[i] for i in inside]
        of_blocks = {"blocks": list(dict.fromkeys(owners)), "param_blocks": owners}
        groups = [{"params": [tensors.named[i] for i in inside], **of_blocks}]
        outside = [named for named, block in zip(tensors.named, tensors.blocks) if block is None]
        if outside:
            groups.append({"params": outside, "mask": None})
    dtype, moment_dtype = tensors.params[0].dtype, tensors.moments[0][0].dtype
    optimizer = gk.FusedGradDropAdamW(
        groups, mask=case.policy(tensors.named), masked=case.masked, backend=backend,
        moment_dtype=moment_dtype if moment_dtype != dtype else None, **HYPERS, **options,
    )  # fmt: skip
    return tensors.attach(optimizer, moment_dtype, tensors.device)


def bytes_per_param(mode: str) -> int:
    """28, 22 or 14: read p, g, m, v; write p, m, v."""
    dtype, moment_dtype = MODES[mode]
    return 3 * dtype.itemsize + 4 * moment_dtype.itemsize


def active_share(optimizer: gk.FusedGradDropAdamW) -> float:
    sizes = [sum(param.numel() for param in group["params"]) for group in optimizer.param_groups]
    return sum(share * size for share, size in zip(optimizer.active_fraction(), sizes)) / sum(sizes)


def ours(case: Case, tensors: GpuTensors, mode: str, backend: str, timer) -> Variant:
    """The variant, or one with its error."""
    variant = Variant(case.name, "ours", lambda: None, backend)

    def make() -> None:
        before = timer.allocated()
        optimizer = make_optimizer(case, tensors, backend)
        case.enter_last_epoch(optimizer)
        variant.step, variant.kept_bytes = optimizer.step, timer.allocated() - before
        full, grad = bytes_per_param(mode), MODES[mode][0].itemsize
        dropped = {ALL_STREAMS: full, 0: 0}.get(case.dropped_streams, full - grad)
        variant.moved = lambda: full + case.mask_bits / 8
        if case.needs_blocks:  # blocks change from step to step; active_fraction() is plain arithmetic then
            variant.active = lambda: active_share(optimizer)
            variant.moved = lambda: full * variant.active() + dropped * (1 - variant.active())

    attempt(variant, timer, make)
    return variant


def peer_variant(peer: Peer, tensors: GpuTensors, mode: str, timer, name: str = "", kind: str = "peer") -> Variant:
    """Peers are counted by the bytes of AdamW with moments in the dtypes of the mode, whatever they move."""
    variant = Variant(name or peer.name, kind, lambda: None)
    reason = unavailable(peer) or (None if mode in peer.modes else f"does not do {mode}")
    if reason:
        variant.error = reason
        return variant

    def make() -> None:
        before = timer.allocated()
        variant.step, variant.after = peer.make(tensors, HYPERS)
        variant.kept_bytes = timer.allocated() - before

    variant.moved = lambda: bytes_per_param(mode)
    if attempt(variant, timer, make) and peer is BASELINE and MODES[mode][0] != MODES[mode][1]:
        variant.moved = lambda: bytes_per_param("bfloat16")  # torch keeps bfloat16 moments there
    return variant


def first_steps(tensors: GpuTensors, mode: str, backends: list[str], timer) -> list[dict]:
    """The first step of a fresh optimizer: moments of zeros, where IEEE division and square root take slow paths."""
    zeros = [tuple(torch.zeros_like(moment) for moment in pair) for pair in tensors.moments]
    fresh = replace(tensors, moments=zeros)
    made = [(BASELINE.name, None, lambda: torch_adamw(fresh, HYPERS, fused=True))]
    for backend in backends:
        for name in ("mask=None", "GradDrop"):
            made.append((name, backend, functools.partial(make_optimizer, CASE[name], fresh, backend)))
    rows = []
    for name, backend, make in made:
        try:
            optimizer, seconds = make(), []
            for _ in range(FIRST_STEPS + 1):  # the first compiles
                for state in optimizer.state.values():
                    for tensor in state.values():
                        tensor.zero_()
                seconds.append(timer.time(optimizer.step, 0.02).seconds)
            rows.append({"name": name, "backend": backend, **quartiles("seconds", seconds[1:])})
        except Exception as error:
            timer.synchronize()
            rows.append({"name": name, "backend": backend, "error": message(error)})
    return rows


def measure(work: str, mode: str, timer: GpuTimer | RehearsalTimer, deadline: float, slow_peers: bool) -> dict:
    """One configuration. ``slow_peers``: only those that compile for long, and GradDrop; else all others."""
    shapes = WORK[work].small() if timer.rehearsal else WORK[work].tensors()
    tensors = make_tensors(shapes, mode, timer.device)
    tensors.keep_grads(), tensors.torchs_moments  # now, so that no variant is charged for them
    copy = copy_bandwidth(timer)
    backends = backends_for(timer.device, mode)
    variants = [peer_variant(BASELINE, tensors, mode, timer)]
    if MODES[mode][0] != MODES[mode][1]:  # torch's own way to float32 moments is to make everything float32
        wide = make_tensors(shapes, "float32", timer.device)
        variants.append(peer_variant(BASELINE, wide, "float32", timer, f"{BASELINE.name}, all float32"))
    for case in GPU_CASES:
        fits = (not case.needs_blocks or any(tensors.blocks)) and (case.name != FIXED or work == WITH_FIXED)
        if fits and (not slow_peers or case.name == "GradDrop"):
            variants += [ours(case, tensors, mode, backend, timer) for backend in backends]
    variants += [
        peer_variant(peer, tensors, mode, timer)
        for peer in PEERS
        if peer is not BASELINE and peer.slow_start == slow_peers and not (peer.make is None and slow_peers)
    ]
    variants.append(peer_variant(BASELINE, tensors, mode, timer, f"{BASELINE.name}, again", "check"))
    interleave(variants, timer, deadline, 2 if timer.rehearsal else 12, 2 if timer.rehearsal else 150)
    config = {"work": WORK[work].label, "mode": mode, "numel": tensors.numel, "tensors": len(tensors.named)}
    config |= {"backends": backends, "bytes_per_param": bytes_per_param(mode), "copy": copy}
    config["rows"] = summarize(variants, tensors.numel, copy["gb_per_s"])
    config["first_steps"] = [] if slow_peers else first_steps(tensors, mode, backends, timer)
    return config


def show(config: dict, began: float) -> None:
    elapsed = time.monotonic() - began
    print(f"{config['work']}, {config['mode']}: copy {config['copy']['gb_per_s']:.0f} GB/s, {elapsed:.0f} s")
    for row in config["rows"]:
        name = f"{row['name']} [{row['backend']}]" if row["backend"] else row["name"]
        figures = row.get("error")
        if figures is None:
            figures = f"{row['seconds'] * 1e3:9.3f} ms {row['ratio']:7.3f} {row['of_copy']:5.0%} of copy"
        print(f"  {name:<44}{figures}", flush=True)


def main() -> int:
    parser = machine.gpu_arguments(__doc__)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--slow-peers", action="store_true", help="peers that compile for long: a file of their own")
    options = parser.parse_args()
    timer, began = make_timer(options.rehearse), time.monotonic()
    plans = [(work, mode) for work in options.work for mode in options.modes]
    failed = 0
    for work in options.work:
        load, configs, errors = machine.Load(), [], []
        for mode in options.modes:
            deadline = began + options.budget * (plans.index((work, mode)) + 1) / len(plans)
            try:
                configs.append(measure(work, mode, timer, deadline, options.slow_peers))
                show(configs[-1], began)
            except Exception as error:  # out of memory, say: the next may be smaller
                errors.append({"work": WORK[work].label, "mode": mode, "error": message(error)})
                print(f"{work}, {mode} left out: {errors[-1]['error']}", file=sys.stderr, flush=True)
            results = {"load": load.report(), "peers": table(), "configs": configs, "errors": errors}
            path = machine.write_gpu(f"step_gpu_{work}{'_slow_peers' if options.slow_peers else ''}", options, results)
            gc.collect()
            timer.release()
        failed += len(errors)
        print(path, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
