"""Time of a step over tensors of one element: what Python and the tables cost, without memory traffic."""

import time
from dataclasses import replace

import torch

from graddrop_kernels.backends import cpu

from ..common.cases import CASE
from ..common.machine import Load
from ..common.peers import TORCHS
from ..common.results import arguments, write
from ..common.rounds import interleave
from ..common.tensors import Tensors, make_tensors
from ..common.timers import HostTimer
from ..common.variants import cpu_rows, on_isas, ours, peer_variant

TENSORS = (100, 200, 400, 1000, 2000, 4000)
MEASURED = ("mask=None", "GradDrop", "GradDropEpoch, bit-packed", "LayerGradDrop", "GradFreeze, half frozen")


def one_element(count: int) -> Tensors:
    """Makes ``count`` parameters of one element, 16 per block as in XLM-R."""
    blocks = [f"encoder.layer.{i // 16}" for i in range(count)]
    return make_tensors([(f"{block}.weight{i % 16}", block, (1,)) for i, block in enumerate(blocks)], "float32")


def dtensors(tensors: Tensors) -> Tensors:
    """Converts them to DTensors, as FSDP2 gives an optimizer. All of their elements are in this process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    shard = lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
    sharded = Tensors([], tensors.blocks, [tuple(map(shard, pair)) for pair in tensors.moments])
    for name, param in tensors.named:
        sharded.named.append((name, torch.nn.Parameter(shard(param.detach()))))
        sharded.named[-1][1].grad = DTensor(param.grad, sharded.named[-1][1]._spec, requires_grad=False)  # as FSDP2
    return sharded


def measure(count: int, seconds: float, min_rounds: int, max_rounds: int) -> list[dict]:
    deadline, timer = time.monotonic() + seconds, HostTimer()
    tensors, isas = one_element(count), [cpu.isa()]
    variants = [peer_variant(peer, tensors, "float32", timer) for peer in TORCHS]
    for name in MEASURED:
        variants += on_isas(ours(CASE[name], tensors, "float32", "cpu", timer), isas)
    sharded = ours(CASE["GradDrop"], dtensors(tensors), "float32", "cpu", timer)
    variants += on_isas(replace(sharded, name="GradDrop, DTensors"), isas)
    interleave(variants, timer, deadline, min_rounds, max_rounds, 5, f"{count} tensors")
    return [{"tensors": count, **row} for row in cpu_rows(variants, count)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=list(TENSORS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    torch.set_num_threads(options.threads)
    load, rows = Load(), []
    for count in options.tensors:
        rounds = (2, 2) if options.quick else (20, 2000)
        found = measure(count, options.budget / len(options.tensors), *rounds)
        for row in found:
            print(f"{count:5} tensors  {row['name']:<28}{row['seconds'] * 1e6:10.0f} us{row['ratio']:8.2f}", flush=True)
        rows += found
    results = {"threads": options.threads, "load": load.report(), "rows": rows}
    print(write("host_overhead", options, results))


if __name__ == "__main__":
    main()
