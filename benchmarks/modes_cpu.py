"""Time of a step in each mode of 16-bit training and with clipping, beside the peers that offer it.

Each table has a baseline and its own tensors; a ratio is the median over rounds of a time over the baseline's in the
same round. Peers that are not installed are left out and named: `pip install torchao torch-optimi`.
"""

import importlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import machine
import torch
from step_cpu import HYPERS, Tensors, Variant, attach, interleave, make_tensors, summarize

import graddrop_kernels as gk
from graddrop_kernels.backends import cpu

P = 0.2
NO_LIMIT = math.inf  # a norm that is never reached: torch multiplies by 1 all the same, and so do we
F32, BF16 = torch.float32, torch.bfloat16


def ours(tensors: Tensors, name: str, mask, **more) -> Variant:
    """On the best instruction set."""
    optimizer = gk.FusedGradDropAdamW(tensors.named, mask=mask, backend="cpu", **HYPERS, **more)
    attach(optimizer, tensors)
    if more.get("master_weights") or more.get("moment_dtype"):
        for state in optimizer.state.values():
            state.update({key: state[key].float() for key in ("exp_avg", "exp_avg_sq")})
    return Variant(name, "ours", optimizer.step, cpu.isa())


def torch_fused(tensors: Tensors, params: list[torch.nn.Parameter] | None = None) -> Callable[[], object]:
    """torch's step of the tensors' parameters, or of ``params`` with moments of their dtype."""
    if params is None:
        return attach(torch.optim.AdamW([param for _, param in tensors.named], fused=True, **HYPERS), tensors).step
    optimizer = torch.optim.AdamW(params, fused=True, **HYPERS)
    for param, (exp_avg, exp_avg_sq) in zip(params, tensors.moments):
        moments = {"exp_avg": exp_avg.to(param.dtype), "exp_avg_sq": exp_avg_sq.to(param.dtype)}
        optimizer.state[param] = {"step": torch.tensor(1000.0), **moments}
    return optimizer.step


def clipping(tensors: Tensors) -> list[Variant]:
    params, update = [param for _, param in tensors.named], torch_fused(tensors)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, NO_LIMIT)
        update()

    mask = gk.GradDrop(P)
    return [
        ours(tensors, "GradDrop", mask),
        ours(tensors, "GradDrop, max_grad_norm", mask, max_grad_norm=NO_LIMIT),
        ours(tensors, "GradDrop, max_grad_norm, norm_after_mask", mask, max_grad_norm=NO_LIMIT, norm_after_mask=True),
        Variant("torch fused", "peer", update),
        Variant("clip_grad_norm_, torch fused", "peer", clip_and_step),
    ]


def masters(tensors: Tensors) -> list[Variant]:
    """The baseline keeps masters as one does by hand: widen the gradients, step, copy the masters back."""
    params = [param for _, param in tensors.named]
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    for master in wide:
        master.grad = torch.empty_like(master)
    update, wide_grads, grads = torch_fused(tensors, wide), [master.grad for master in wide], [p.grad for p in params]

    @torch.no_grad()
    def by_hand() -> None:
        torch._foreach_copy_(wide_grads, grads)
        update()
        torch._foreach_copy_(params, wide)

    return [
        Variant("float32 masters by hand, torch fused", "peer", by_hand),
        ours(tensors, "mask=None, master_weights", None, master_weights=True),
        ours(tensors, "GradDrop, master_weights", gk.GradDrop(P), master_weights=True),
        ours(tensors, "GradDrop, moment_dtype=float32", gk.GradDrop(P), moment_dtype=F32),
    ]


def stochastic(tensors: Tensors) -> list[Variant]:
    params = [param for _, param in tensors.named]
    found = [
        Variant("torch fused, rounded to nearest", "peer", torch_fused(tensors)),
        ours(tensors, "GradDrop, rounded to nearest", gk.GradDrop(P)),
        ours(tensors, "mask=None, stochastic_rounding", None, stochastic_rounding=True),
        ours(tensors, "GradDrop, stochastic_rounding", gk.GradDrop(P), stochastic_rounding=True),
    ]
    if has("torchao"):
        from torchao.optim import _AdamW

        found.append(Variant("torchao _AdamW, bf16_stochastic_round", "peer",
                             _AdamW(params, bf16_stochastic_round=True, **HYPERS).step))  # fmt: skip
    if has("optimi"):
        from optimi import AdamW

        found.append(Variant("optimi AdamW, Kahan summation", "peer",
                             AdamW(params, kahan_sum=True, foreach=True, **HYPERS).step))  # fmt: skip
    return found


def has(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        print(f"left out, not installed: {package}", file=sys.stderr)
        return False
    return True


TABLES = {"clipping": (F32, clipping), "masters": (BF16, masters), "stochastic rounding": (BF16, stochastic)}


def measure(name: str, threads: int, numel: int, seconds: float, quick: bool) -> dict:
    """One table on so many threads: called in a process of its own."""
    torch.set_num_threads(threads)
    deadline = time.monotonic() + seconds
    torch.manual_seed(time.time_ns() % 2**31)
    dtype, make = TABLES[name]
    tensors = make_tensors("layers", numel, dtype)
    load, variants = machine.Load(), make(tensors)
    interleave(variants, deadline, *((2, 2) if quick else (5, 1000)), f"{name}, {threads} threads")
    rows = [
        {key: row[key] for key in ("name", "kind", "isa", "seconds", "ratio", "ratio_p20", "ratio_p80", "repetitions")}
        for row in summarize(variants, tensors.numel, dtype.itemsize)
    ]
    for row in rows:
        what = f"{name}, {threads} threads  {row['name']:<42}"
        print(f"{what}{row['seconds'] * 1e3:9.2f} ms{row['ratio']:8.2f}", flush=True)
    return {"table": name, "threads": threads, "numel": tensors.numel, "load": load.report(), "rows": rows}


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--numel", type=int, default=50_000_000, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=360, metavar="SECONDS", help="of all tables, setup included")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    numel = min(options.numel, 200_000) if options.quick else options.numel
    seconds = 0 if options.quick else options.budget / len(TABLES) / len(options.threads)
    load, tables = machine.Load(), []
    for threads in options.threads:
        for name in TABLES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                tables.append(pool.submit(measure, name, threads, numel, seconds, options.quick).result())
    print(machine.write("modes_cpu", options, {"load": load.report(), "tables": tables}))


if __name__ == "__main__":
    main()
