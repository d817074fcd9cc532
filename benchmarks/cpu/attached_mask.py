"""What attach_mask adds to a step of any optimizer: its pass over the gradients of 100M parameters, in float32.

The optimizer here does nothing, so that only the hooks and the pass are measured. The baseline is one fused AdamW step
of torch. "bernoulli_" is a mask as one writes it, without its scale: draw into a tensor, multiply. The gradients are
restored before each measurement, which is not timed.
"""

import time
from typing import Any

import torch

from graddrop_kernels import GaussianGradDrop, GradDrop, GradDropEpoch, LayerGradDrop, attach_mask
from graddrop_kernels.backends import cpu

from ..common.cases import P
from ..common.machine import Load
from ..common.results import arguments, write
from ..common.rounds import FIFTHS, Variant, interleave, paired, summarize
from ..common.shapes import encoder
from ..common.tensors import Tensors, make_tensors
from ..common.timers import HostTimer

BERNOULLI = f"bernoulli_({1 - P:g}), multiply"
POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    f"GradDrop({P})": (GradDrop(p=P), {}),
    f'GradDrop({P}, every="epoch")': (GradDrop(p=P, every="epoch"), {}),
    f"GaussianGradDrop({P})": (GaussianGradDrop(p=P), {}),
    "GradDropEpoch(5)": (GradDropEpoch(5), {"masked": "gradient"}),
    'GradDropEpoch(5, storage="bitpacked")': (GradDropEpoch(5, storage="bitpacked"), {"masked": "gradient"}),
    f"LayerGradDrop({P})": (LayerGradDrop(p=P, layers=("encoder.layer.*",)), {}),
    f"LayerGradDrop({P}, frozen)": (LayerGradDrop(p=P, layers=("encoder.layer.*",)), {"masked": "frozen"}),
}


class Nothing(torch.optim.Optimizer):
    """An optimizer whose step does nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        """Does nothing."""


def variants_of(tensors: Tensors) -> list[Variant]:
    torchs = torch.optim.AdamW(tensors.params, fused=True)
    tensors.attach(torchs, torch.float32, torch.device("cpu"))
    masks = [torch.empty_like(param) for param in tensors.params]

    def by_hand() -> None:
        for param, mask in zip(tensors.params, masks):
            param.grad.mul_(mask.bernoulli_(1 - P))

    found = [Variant("torch fused AdamW", "peer", torchs.step), Variant(BERNOULLI, "peer", by_hand)]
    for seed, (name, (policy, how)) in enumerate(POLICIES.items()):
        optimizer = Nothing(tensors.params)
        handle = attach_mask(optimizer, policy, named_parameters=tensors.named, seed=seed, **how)
        handle.set_epoch(2)
        found.append(Variant(name, "ours", optimizer.step))
    for variant in found:
        variant.before = tensors.restore_grads
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=90, metavar="SECONDS", help="of the rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters")
    options = parser.parse_args()
    if cpu.unavailable():
        raise SystemExit(f"nothing to measure: {cpu.unavailable()}")
    torch.set_num_threads(options.threads)
    load, tensors = Load(), make_tensors(encoder(100_000 if options.quick else options.numel), "float32")
    tensors.keep_grads()
    variants = variants_of(tensors)
    rounds, seconds = ((2, 2), 0.0) if options.quick else ((10, 1000), options.budget)
    interleave(variants, HostTimer(), time.monotonic() + seconds, *rounds, 5, "attached mask")
    by_hand = variants[1]

    def figures(variant: Variant, row: dict[str, Any]) -> dict[str, Any]:
        ratios = sorted(paired(by_hand, variant))
        return {"bernoulli_ratio": ratios[len(ratios) // 2]}

    rows = summarize(variants, FIFTHS, figures)
    for row in rows:
        print(f"{row['name']:<42}{row['seconds'] * 1e3:9.2f} ms{row['ratio']:8.3f}", flush=True)
    found = {"numel": tensors.numel, "threads": options.threads, "isa": cpu.isa(), "rows": rows}
    print(write("attached_mask", options, {"load": load.report(), **found}))


if __name__ == "__main__":
    main()
