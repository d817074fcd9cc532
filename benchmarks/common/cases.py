"""The policies as they are measured, and their optimizers on shared tensors."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import graddrop_kernels as gk
from graddrop_kernels.backends import BACKENDS
from graddrop_kernels.policies.paper import METHODS, Method

from .shapes import LAYERS
from .tensors import MODES, Tensors

warnings.filterwarnings("ignore", message="two optimizers are stepped in turn")  # variants, on the same tensors

HYPERS = {"lr": 1e-6, "weight_decay": 0.01}  # small, so that the parameters hardly move over thousands of steps
P = 0.2
EPOCHS = 5  # of GradDropEpoch, measured in the middle one
ALL_STREAMS = 7  # of memory: read p, g, m, v; write p, m, v
NO_GRAD_STREAMS = 6  # a dropped block whose gradient counts as 0
MEANINGS = ("reference", "exact")  # backends that define what is right, slowly


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

    def optimizer(self, tensors: Tensors, **options) -> gk.FusedGradDropAdamW:
        """Policies of blocks leave what is outside the blocks dense."""
        groups = tensors.named
        if self.needs_blocks:
            inside = [i for i, block in enumerate(tensors.blocks) if block is not None]
            owners = [tensors.blocks[i] for i in inside]
            of_blocks = {"blocks": list(dict.fromkeys(owners)), "param_blocks": owners}
            groups = [{"params": [tensors.named[i] for i in inside], **of_blocks}]
            outside = [named for named, block in zip(tensors.named, tensors.blocks) if block is None]
            if outside:
                groups.append({"params": outside, "mask": None})
        return gk.FusedGradDropAdamW(groups, mask=self.policy(tensors.named), masked=self.masked, **HYPERS, **options)

    def enter_last_epoch(self, optimizer: gk.FusedGradDropAdamW) -> None:
        """One step per epoch, so that buckets of different ages are measured."""
        for epoch in self.epochs:
            optimizer.set_epoch(epoch)
            optimizer.step()


@functools.lru_cache(maxsize=1)  # half a billion bits take seconds on the CPU, and the modes can share them
def _fixed_half(shapes: tuple) -> gk.FixedMask:
    return gk.FixedMask({name: _coins(shape) for name, shape in shapes})


def _coins(shape: tuple[int, ...]) -> torch.Tensor:
    """Returns random bools, of random bytes: torch.randint takes five times as long."""
    numel = math.prod(shape)
    drawn = np.frombuffer(np.random.default_rng().bytes(-(-numel // 8)), np.uint8)
    return torch.from_numpy(np.unpackbits(drawn, count=numel).view(bool)).view(shape)


def _half(named) -> gk.FixedMask:
    return _fixed_half(tuple((name, tuple(param.shape)) for name, param in named))


_MIDDLE = tuple(range(EPOCHS // 2 + 1))
_FROZEN_BLOCKS = {"dropped_streams": 0, "needs_blocks": True}
# What a row of the paper's table is measured with beside p; the names are those of the results.
_MEASURED = {
    "gradfreeze-topdown": {"name": "GradFreeze, half frozen", "of_epochs": 2},
    "graddrop-epoch": {"name": "GradDropEpoch, recomputed", "epochs": _MIDDLE},
    "graddrop-epoch-bitpacked": {"epochs": _MIDDLE, "mask_bits": 3},
    "graddrop-epoch-toggle": {"epochs": _MIDDLE},
}


def _case(method: Method, name: str | None = None, of_epochs: int = EPOCHS, **more) -> Case:
    policy = method(of_epochs, P)
    if method.needs_blocks:
        more = {"dropped_streams": 0 if method.masked == "frozen" else NO_GRAD_STREAMS, "needs_blocks": True, **more}
    return Case(name or method.name, lambda named: policy, **more)


CASES = (
    *(_case(method, **_MEASURED.get(key, {})) for key, method in METHODS.items() if method.timed),
    Case("GradDrop, frozen", lambda named: gk.GradDrop(P), masked="frozen"),
    Case("GradDrop, update", lambda named: gk.GradDrop(P), masked="update"),
    Case("FixedMask, 50 %", _half, mask_bits=1),
)
CASE = {case.name: case for case in CASES}
FIXED = "FixedMask, 50 %"
SWEEP = tuple(  # the first has nothing frozen
    Case(f"{frozen} of {LAYERS} layers frozen", lambda named: gk.GradFreeze(LAYERS, blocks_per_epoch=1),
         (LAYERS - frozen - 1,), **_FROZEN_BLOCKS)
    for frozen in (0, 5, 10, 15, 20, 24)
)  # fmt: skip


def backends_for(device: torch.device, mode: str) -> list[str]:
    """Names of the fast backends that can step such tensors here."""
    rows = [backend for backend in BACKENDS if backend.name not in MEANINGS]
    return [backend.name for backend in rows if backend.misfit(device, *MODES[mode]) is None]


def make_optimizer(case: Case, tensors: Tensors, backend: str, **options) -> gk.FusedGradDropAdamW:
    """The case with the shared moments."""
    dtype, moment_dtype = tensors.params[0].dtype, tensors.moments[0][0].dtype
    own = moment_dtype if moment_dtype != dtype else None
    optimizer = case.optimizer(tensors, backend=backend, moment_dtype=own, **options)
    return tensors.attach(optimizer, moment_dtype, tensors.device)


def active_share(optimizer: gk.FusedGradDropAdamW) -> float:
    sizes = [sum(param.numel() for param in group["params"]) for group in optimizer.param_groups]
    return sum(share * size for share, size in zip(optimizer.active_fraction(), sizes)) / sum(sizes)
