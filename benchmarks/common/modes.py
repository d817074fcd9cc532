"""Tables of the modes of 16-bit training, of clipping and of masks on the update, the same on the CPU and on the GPU.

A table has its own tensors, rows of ours, which are options of the optimizer, and the peers that offer the same. On the
GPU its first peer is the baseline, on the CPU its first row.
"""

import math
from dataclasses import dataclass, field, replace

import torch

import graddrop_kernels as gk

from .cases import CASE, make_optimizer
from .peers import ALL, BASELINE, Made, Peer, fused, imported
from .rounds import Variant, attempt, nothing
from .tensors import Tensors
from .timers import Timer
from .variants import peer_variant

NO_LIMIT = math.inf  # a norm that is never reached; torch still multiplies by 1, and so do we


@dataclass(frozen=True)
class Ours:
    """``moved``: bytes per parameter that a step has to move."""

    name: str
    moved: int
    options: dict = field(default_factory=dict)
    case: str = "GradDrop"

    def optimizer(self, tensors: Tensors, backend: str) -> gk.FusedGradDropAdamW:
        return make_optimizer(CASE[self.case], tensors, backend, **self.options)

    def variant(self, tensors: Tensors, backend: str, timer: Timer) -> Variant:
        """Makes the variant, or one with its error."""
        variant = Variant(self.name, "ours", by=backend, moved=lambda: self.moved)

        def make() -> None:
            before = timer.allocated()
            variant.step = self.optimizer(tensors, backend).step
            variant.kept_bytes = timer.allocated() - before

        attempt(variant, timer, make)
        return variant


@dataclass(frozen=True)
class Theirs:
    """A peer. Its bytes are those that the mode has to move, whatever the peer moves."""

    peer: Peer
    moved: int
    on_cpu: bool = True

    def variant(self, tensors: Tensors, mode: str, timer: Timer) -> Variant:
        variant = peer_variant(self.peer, tensors, mode, timer)
        variant.moved = lambda: self.moved
        return variant


@dataclass(frozen=True)
class Table:
    """``mode``: one of tensors.MODES."""

    mode: str
    rows: tuple[Ours | Theirs, ...]


def clip_and_step(tensors: Tensors, hypers: dict) -> Made:
    """Computes norms and factors, on the GPU with many tensors per launch, on a CPU tensor by tensor, as torch
    chooses.
    """
    update, _ = fused(tensors, hypers)
    foreach = tensors.device.type == "cuda"

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(tensors.params, NO_LIMIT, foreach=foreach)
        update()

    return step, nothing


def masters_by_hand(tensors: Tensors, hypers: dict) -> Made:
    """Does by hand what an optimizer without masters cannot: widens gradients, steps float32 copies, copies them
    back.
    """
    copies = [torch.nn.Parameter(param.detach().float()) for param in tensors.params]
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    update, _ = fused(replace(tensors, named=[("", copy) for copy in copies]), hypers)
    wide_grads, grads = [copy.grad for copy in copies], [param.grad for param in tensors.params]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(wide_grads, grads)
        update()
        torch._foreach_copy_(tensors.params, copies)

    return step, nothing


def kahan(tensors: Tensors, hypers: dict) -> Made:
    implementation = {"triton": True} if tensors.device.type == "cuda" else {"foreach": True}
    return imported("optimi", "AdamW", kahan_sum=True, **implementation)(tensors, hypers)


_CLIPPED = Peer("clip_grad_norm_, torch fused", None, "torch", clip_and_step, ALL, "gradients are read twice, written")
_BY_HAND = Peer("float32 masters by hand, torch fused", None, "torch", masters_by_hand, ALL,
                "gradients are kept twice, the second time in float32")  # fmt: skip
_WITH_MASTERS = Peer("TransformerEngine FusedAdam, master_weights", "transformer_engine.pytorch.optimizers",
                     "transformer-engine",
                     imported("transformer_engine.pytorch.optimizers", "FusedAdam", adam_w_mode=True,
                              master_weights=True), ALL, "no amsgrad, no maximize")  # fmt: skip
_STOCHASTIC = Peer("torchao _AdamW, bf16_stochastic_round", "torchao.optim", "torchao",
                   imported("torchao.optim", "_AdamW", bf16_stochastic_round=True), ALL,
                   "one compiled call per tensor", slow_start=True)  # fmt: skip
_KAHAN = Peer("optimi AdamW, Kahan summation", "optimi", "torch-optimi", kahan, ALL,
              "keeps what rounding loses in 16 bits more; on the GPU a launch per tensor")  # fmt: skip
_NORM = {"max_grad_norm": NO_LIMIT}
_MASTERS, _STOCHASTICALLY = {"master_weights": True}, {"stochastic_rounding": True}
_MOMENTS = {"stochastic_moments": True}


def _updates(mode: str, moved: int) -> Table:
    return Table(mode, (
        Ours("GradDrop", moved),
        Ours('GradDrop, masked="update"', moved, case="GradDrop, update"),
        Ours("GradDrop, cautious_weight_decay", moved, {"cautious_weight_decay": True}),
        Ours("SkipUpdate", moved, case="SkipUpdate"),
        Theirs(BASELINE, moved),
    ))  # fmt: skip


TABLES = {
    "clipping": Table("float32", (
        Ours("GradDrop", 28),
        Ours("GradDrop, max_grad_norm", 32, _NORM),
        Ours("GradDrop, max_grad_norm, norm_after_mask", 32, {**_NORM, "norm_after_mask": True}),
        Theirs(BASELINE, 28),
        Theirs(_CLIPPED, 32),
    )),
    "masters": Table("bfloat16, float32 moments", (
        Theirs(_BY_HAND, 28),
        Ours("mask=None, master_weights", 28, _MASTERS, "mask=None"),
        Ours("GradDrop, master_weights", 28, _MASTERS),
        Ours("GradDrop, moment_dtype=float32", 22),  # which the mode says
        Theirs(_WITH_MASTERS, 28, on_cpu=False),
    )),
    "stochastic rounding": Table("bfloat16", (
        Theirs(replace(BASELINE, name="torch fused, rounded to nearest"), 14),
        Ours("GradDrop, rounded to nearest", 14),
        Ours("mask=None, stochastic_rounding", 14, _STOCHASTICALLY, "mask=None"),
        Ours("GradDrop, stochastic_rounding", 14, _STOCHASTICALLY),
        Ours("GradDrop, stochastic_moments", 14, _MOMENTS),
        Ours("GradDrop, stochastic_rounding, stochastic_moments", 14, {**_STOCHASTICALLY, **_MOMENTS}),
        Theirs(_STOCHASTIC, 14),
        Theirs(_KAHAN, 14),
    )),
    "masks on the update, float32": _updates("float32", 28),
    "masks on the update, bfloat16": _updates("bfloat16", 14),
}  # fmt: skip
