"""TensorBatch and Hyper: all that a backend is given, in tensors and plain numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock


@dataclass(frozen=True)
class Hyper:
    """One row of hyper-parameters: what the parameters of one group under one plan share."""

    lr: float | torch.Tensor  # a tensor where it lies on a GPU, from which nothing is to be fetched
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    plan: MaskPlan


@dataclass
class TensorBatch:
    """Parallel lists, one entry a parameter: contiguous, on one device, with the same dtypes.

    It knows nothing of groups or policies. ``steps`` are advanced by the backend call; ``max_exp_avg_sqs`` has None
    without amsgrad; ``hyper_rows`` are indices into ``hypers``, which, like ``grads``, is filled anew for every step.
    Everything else stays as long as no tensor moves, so that a backend may keep what it derives from it in ``table``.

    With master weights ``params`` are the masters, in float32, and ``copies`` the parameters themselves, which have the
    gradients' dtype and get the masters rounded.

    Complex tensors are here as pairs of real numbers (``param_dtype`` stays complex), of which a mask keeps or drops
    both.
    """

    device: torch.device
    param_dtype: torch.dtype
    moment_dtype: torch.dtype
    params: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[torch.Tensor | None] = field(default_factory=list)
    steps: list[torch.Tensor] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    layouts: list[RowBlock] = field(default_factory=list)
    mask_words: list[torch.Tensor | None] = field(default_factory=list)
    hyper_rows: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)  # positions among the parameters that have gradients
    spans: list[slice | None] = field(default_factory=list)  # of each of these; None: all of it
    plans_of: list[tuple[Any, ...]] = field(default_factory=list)  # of each hyper row
    grads: list[torch.Tensor] = field(default_factory=list)
    hypers: list[Hyper] = field(default_factory=list)
    grad_scale: torch.Tensor | None = None  # one float32: gradients are divided by it, and written back
    found_inf: torch.Tensor | None = None  # one float32: not 0 makes the step a no-op
    clip_factor: torch.Tensor | None = None  # one float32: gradients are multiplied by it after that, in registers
    grad_dtype: torch.dtype | None = None  # None: param_dtype
    stochastic: bool = False  # params (bfloat16) are rounded up or down at random, with the odds of where they lie
    sharded_over: tuple[Any, ...] = ()  # process groups over which a sum over all elements is still to be added up
    copies: list[torch.Tensor] = field(default_factory=list)
    staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (tensor, its contiguous copy)
    table: Any = None  # of a type of the backend's own

    @property
    def parts(self) -> int:
        """Numbers an element of a mask."""
        return 2 if self.param_dtype.is_complex else 1

    def step_with(self, masked_adamw_: Callable[["TensorBatch"], None]) -> None:
        """Steps it, through contiguous copies where a tensor has other strides: slower, and right where torch's fused
        CPU kernel silently is not. Copied now: a batch before it may have stepped the same memory.
        """
        for tensor, copy in self.staged:
            copy.copy_(tensor)
        masked_adamw_(self)
        for tensor, copy in self.staged:
            tensor.copy_(copy)

    @property
    def mode(self) -> tuple[Any, ...]:
        """What backends.select() asks about it."""
        return self.device, self.param_dtype, self.moment_dtype, bool(self.copies), self.stochastic
