"""TensorBatch and Hyper: all that a backend is given, in tensors and plain numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..masks.memory_order import MemoryOrder
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock

# Bits of TensorBatch.stochastic: which bfloat16 values are rounded up or down at random, so that the mean is exact.
ROUND_PARAMS, ROUND_MOMENTS = 1, 2


@dataclass(frozen=True)
class Hyper:
    """One row of hyper-parameters, which the parameters of one group under one plan share."""

    lr: float | torch.Tensor  # a tensor on a GPU stays one, so that the host does not wait for its value
    beta1: float
    beta2: float
    eps: float
    weight_decay: float | torch.Tensor  # likewise
    amsgrad: bool
    maximize: bool
    plan: MaskPlan
    cautious: bool = False  # weight decay only where the update does not move the parameter away from 0


@dataclass
class TensorBatch:
    """Parallel lists with one entry per parameter. All tensors are on one device, and of the same dtypes.

    For a backend that goes by addresses they are contiguous, or dense in the order that ``orders`` gives. Layouts and
    ``keys`` always mean an element's index. ``mask_words`` are in the order of memory. Such a backend may find ``rows``
    in place of the tensors: the TensorRows that tensor_table() would make, up to their gradients. A row may be a part
    of its gradient, see grad_addresses().

    It knows nothing of groups or policies. The backend call advances ``steps``. ``max_exp_avg_sqs`` holds None where
    there is no amsgrad. ``hyper_rows`` are indices into ``hypers``. ``hypers`` and ``grads`` are new in every step.
    Everything else stays as long as no tensor moves, so that a backend may keep in ``table`` what it derives from it.

    With master weights ``params`` are the float32 masters. ``copies`` are then the parameters themselves, which have
    the gradients' dtype and receive the rounded masters.

    Complex tensors are given as pairs of real numbers, while ``param_dtype`` stays complex. A mask keeps or drops both
    numbers of a pair.
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
    orders: list[MemoryOrder | None] = field(default_factory=list)  # empty: none
    mask_words: list[torch.Tensor | None] = field(default_factory=list)
    hyper_rows: list[int] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    hypers: list[Hyper] = field(default_factory=list)
    grad_scale: torch.Tensor | None = None  # one float32: gradients are divided by it, and written back
    found_inf: torch.Tensor | None = None  # one float32: not 0 makes the step a no-op
    clip_factor: torch.Tensor | None = None  # one float32: gradients are multiplied by it after that, in registers
    grad_dtype: torch.dtype | None = None  # None: param_dtype
    stochastic: int = 0  # ROUND_PARAMS | ROUND_MOMENTS
    sharded_over: tuple[Any, ...] = ()  # process groups over which a sum over all elements must still be added up
    copies: list[torch.Tensor] = field(default_factory=list)
    staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (tensor, its contiguous copy)
    rows: Any = None
    table: Any = None  # of a type of the backend's own
    grad_offsets: Any = None  # bytes from a gradient's address to that of the row's part of it, uint64; None: 0
    version: int = 0  # to be raised with each step's gradients and hyper-parameters

    @property
    def parts(self) -> int:
        """Numbers per element of a mask."""
        return 2 if self.param_dtype.is_complex else 1

    def grad_addresses(self) -> list[int]:
        """The address of each row's gradient."""
        addresses = list(map(torch.Tensor.data_ptr, self.grads))
        if self.grad_offsets is None:
            return addresses
        return (np.array(addresses, np.uint64) + self.grad_offsets).tolist()  # type: ignore[no-any-return]

    def step_with(self, masked_adamw_: Callable[["TensorBatch"], None]) -> None:
        """Steps the batch. A tensor that the backend cannot take as it lies is stepped through a contiguous copy, which
        lives as long as the step. That is slower, and right where torch's fused CPU kernel is silently wrong. It is
        copied now, as an earlier batch may have stepped the same memory.
        """
        for tensor, copy in self.staged:
            copy.copy_(tensor)
        masked_adamw_(self)
        for tensor, copy in self.staged:
            tensor.copy_(copy)

    def release(self) -> None:
        """Drops the references to the tensors. The ``table`` of a backend stays."""
        self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs = [], [], [], []
        self.steps, self.copies, self.staged, self.grads = [], [], [], []
