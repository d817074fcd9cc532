"""Time of a step over tensors of one element: what Python and the tables cost, without memory traffic."""

import time

import torch

from graddrop_kernels.backends import cpu

from ..common import machine
from .step import CASES, Tensors, interleave, ours, summarize, torch_peers

TENSORS = (100, 200, 400, 1000, 2000, 4000)
MEASURED = ("mask=None", "GradDrop", "GradDropEpoch, bit-packed", "LayerGradDrop", "GradFreeze, half frozen")


def make_tensors(count: int) -> Tensors:
    """``count`` parameters of one element, 16 a block as in XLM-R."""
    tensors = Tensors([], [], [f"encoder.layer.{i // 16}" for i in range(count)])
    for i, block in enumerate(tensors.blocks):
        param = torch.nn.Parameter(torch.randn(1))
        param.grad = torch.randn(1)
        tensors.named.append((f"{block}.weight{i % 16}", param))
        tensors.moments.append((torch.randn(1), torch.randn(1).square()))
    return tensors


def dtensors(tensors: Tensors) -> Tensors:
    """The same as DTensors, as FSDP2 hands them to an optimizer; all of their elements are here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    shard = lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
    sharded = Tensors([], [tuple(map(shard, pair)) for pair in tensors.moments], tensors.blocks)
    for name, param in tensors.named:
        sharded.named.append((name, torch.nn.Parameter(shard(param.detach()))))
        sharded.named[-1][1].grad = DTensor(param.grad, sharded.named[-1][1]._spec, requires_grad=False)  # as FSDP2's
    return sharded


def measure(count: int, seconds: float, min_rounds: int, max_rounds: int) -> list[dict]:
    deadline = time.monotonic() + seconds
    tensors = make_tensors(count)
    variants = torch_peers(tensors)
    for case in CASES:
        if case.name in MEASURED:
            variants += ours(case, "ours", tensors, [cpu.isa()])
    graddrop = next(case for case in CASES if case.name == "GradDrop")
    variants += ours(graddrop, "ours", dtensors(tensors), [cpu.isa()], ", DTensors")
    interleave(variants, deadline, min_rounds, max_rounds, f"{count} tensors")
    return [{"tensors": count, **row} for row in summarize(variants, count, 4)]


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=list(TENSORS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    torch.set_num_threads(options.threads)
    load, rows = machine.Load(), []
    for count in options.tensors:
        rounds = (2, 2) if options.quick else (20, 2000)
        found = measure(count, options.budget / len(options.tensors), *rounds)
        for row in found:
            print(f"{count:5} tensors  {row['name']:<28}{row['seconds'] * 1e6:10.0f} us{row['ratio']:8.2f}", flush=True)
        rows += found
    results = {"threads": options.threads, "load": load.report(), "rows": rows}
    print(machine.write("host_overhead", options, results))


if __name__ == "__main__":
    main()
