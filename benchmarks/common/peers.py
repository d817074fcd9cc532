"""Other people's AdamW in one table: how each is made, what it can do. None is required; missing ones are reported.

Options were read in the sources (bitsandbytes 0.50, torchao 0.18, optimi 0.3, Transformer Engine 2.20, apex of 2026,
DeepSpeed 0.19). A peer that does not import, or raises, costs its own row only.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .cases import P
from .rounds import nothing

Made = tuple[Callable[[], object], Callable[[], object]]  # (step, what to do after it, untimed)
ALL = ("float32", "bfloat16, float32 moments", "bfloat16")  # modes: parameters and gradients, moments
NO_MIXED = ("float32", "bfloat16")  # moments in the parameters' dtype


def torch_adamw(tensors, hypers: dict, **implementation) -> torch.optim.AdamW:
    """Makes torch's AdamW on the shared parameters with warm moments in the parameters' own dtype, as torch keeps them.

    Its fused and capturable steps count on the device. The others count on the CPU, where they do not have to
    synchronise.
    """
    optimizer = torch.optim.AdamW(tensors.params, **hypers, **implementation)
    on_device = implementation.get("fused") or implementation.get("capturable")
    tensors.attach(optimizer, tensors.params[0].dtype, tensors.device if on_device else torch.device("cpu"))
    return optimizer


def fused(tensors, hypers: dict) -> Made:
    return torch_adamw(tensors, hypers, fused=True).step, nothing


def foreach(tensors, hypers: dict) -> Made:
    return torch_adamw(tensors, hypers, foreach=True).step, nothing


def for_loop(tensors, hypers: dict) -> Made:
    return torch_adamw(tensors, hypers, foreach=False).step, nothing


def compiled(tensors, hypers: dict) -> Made:
    """Compiles the step with Inductor; on a CPU only traces it, as a rehearsal has no time for more."""
    on_gpu = tensors.device.type == "cuda"
    optimizer = torch_adamw(tensors, hypers, foreach=True, capturable=on_gpu)
    return torch.compile(optimizer.step, backend="inductor" if on_gpu else "eager"), nothing


def eager(keep: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Made]:
    """Writes GradDrop as users do: per tensor draw a mask, multiply, rescale; then torch's fused step."""

    def make(tensors, hypers: dict) -> Made:
        update = torch_adamw(tensors, hypers, fused=True).step
        tensors.keep_grads()

        def step() -> None:
            for param in tensors.params:
                param.grad.mul_(keep(param.grad)).div_(1 - P)
            update()

        return step, tensors.restore_grads

    return make


eager_mask = eager(lambda grad: torch.empty_like(grad).bernoulli_(1 - P))
rand_mask = eager(lambda grad: torch.rand_like(grad) >= P)


def foreach_mask(tensors, hypers: dict) -> Made:
    """Masks all tensors at once: one draw per tensor, two multi-tensor launches, then torch's fused step."""
    update = torch_adamw(tensors, hypers, fused=True).step
    tensors.keep_grads()

    def step() -> None:
        grads = [param.grad for param in tensors.params]
        torch._foreach_mul_(grads, [torch.empty_like(grad).bernoulli_(1 - P) for grad in grads])
        torch._foreach_mul_(grads, 1 / (1 - P))
        update()

    return step, tensors.restore_grads


def imported(module: str, name: str, **options) -> Callable[..., Made]:
    """Imports a class of another package, which keeps its own state."""

    def make(tensors, hypers: dict) -> Made:
        kind = getattr(importlib.import_module(module), name)
        return kind(tensors.params, **hypers, **options).step, nothing

    return make


@dataclass(frozen=True)
class Peer:
    """``slow_start``: compiles for half a minute or more, so it is measured in a run of its own."""

    name: str
    module: str | None  # must import; None: torch itself
    package: str | None
    make: Callable[..., Made] | None
    modes: tuple[str, ...]
    note: str  # how it differs from AdamW with moments in the parameters' dtype, or what it cannot do
    masks: bool = False
    slow_start: bool = False


_FUSED_ADAM = {"adam_w_mode": True}
PEERS = (
    Peer("torch fused", None, "torch", fused, ALL,
         "moments in the parameters' dtype, bfloat16 where ours may be float32"),
    Peer("torch foreach", None, "torch", foreach, ALL, "moments as above; eight or so launches for each few tensors"),
    Peer("torch for-loop", None, "torch", for_loop, ALL, "moments as above; a dozen launches per tensor"),
    Peer("eager mask + torch fused", None, "torch", eager_mask, ALL,
         "moments as above; one mask at a time, as large as its gradient", masks=True),
    Peer("foreach mask + torch fused", None, "torch", foreach_mask, ALL,
         "moments as above; masks as large as all gradients", masks=True),
    Peer("torch compiled", None, "torch", compiled, ALL,
         "moments as above; compiled for these tensors", slow_start=True),
    Peer("apex FusedAdam", "apex.optimizers", "apex",
         imported("apex.optimizers", "FusedAdam", **_FUSED_ADAM), ALL, "float32 moments; no amsgrad, no maximize"),
    Peer("DeepSpeed FusedAdam", "deepspeed.ops.adam", "deepspeed",
         imported("deepspeed.ops.adam", "FusedAdam", **_FUSED_ADAM), ALL,
         "moments in the parameters' dtype; builds its kernel when first made", slow_start=True),
    Peer("TransformerEngine FusedAdam", "transformer_engine.pytorch.optimizers", "transformer-engine",
         imported("transformer_engine.pytorch.optimizers", "FusedAdam", **_FUSED_ADAM), ALL,
         "float32 moments; no amsgrad, no maximize"),
    Peer("bitsandbytes AdamW, 32 bits", "bitsandbytes", "bitsandbytes",
         imported("bitsandbytes.optim", "AdamW", optim_bits=32), ALL,
         "float32 moments; a launch and a synchronisation per tensor"),
    Peer("bitsandbytes AdamW, 8 bits", "bitsandbytes", "bitsandbytes",
         imported("bitsandbytes.optim", "AdamW", optim_bits=8), ALL, "8-bit moments: fewer bytes, other values"),
    Peer("torchao AdamW8bit", "torchao.optim", "torchao",
         imported("torchao.optim", "AdamW8bit"), ALL, "8-bit moments; one compiled call per tensor", slow_start=True),
    Peer("torchao AdamW4bit", "torchao.optim", "torchao",
         imported("torchao.optim", "AdamW4bit"), ALL, "4-bit moments; one compiled call per tensor", slow_start=True),
    Peer("optimi AdamW", "optimi", "torch-optimi",
         imported("optimi", "AdamW", triton=True, kahan_sum=False), NO_MIXED,
         "a Triton launch per tensor; indices of 32 bits"),
    Peer("Liger", "liger_kernel", "liger-kernel", None, (), "has no AdamW"),
)  # fmt: skip
BASELINE = PEERS[0]
TORCHS = PEERS[:3]  # torch's own steps, unmasked
ON_CPU = (
    *TORCHS,
    Peer("bernoulli_ mask, multiply, torch fused", None, "torch", eager_mask, ALL, PEERS[3].note, masks=True),
    Peer("torch.rand mask, multiply, torch fused", None, "torch", rand_mask, ALL, PEERS[3].note, masks=True),
)


def unavailable(peer: Peer) -> str | None:
    """Returns why the peer cannot be measured here; None if it can."""
    if peer.make is None:
        return peer.note
    if peer.module is None:
        return None
    try:
        importlib.import_module(peer.module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == peer.module.split(".")[0]
        return "not installed" if missing else f"does not import: {error}"
    except Exception as error:  # a package built for another CUDA may raise anything
        return f"does not import: {type(error).__name__}: {error}"
    return None


def table(peers: Iterable[Peer] = PEERS) -> list[dict]:
    """Lists every peer as plain values, installed or not."""
    return [
        {"name": peer.name, "version": _version(peer.package), "unavailable": unavailable(peer),
         "modes": list(peer.modes), "masks": peer.masks, "note": peer.note}
        for peer in peers
    ]  # fmt: skip


def _version(package: str | None) -> str | None:
    try:
        return version(package) if package else None
    except PackageNotFoundError:
        return None
