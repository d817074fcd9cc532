"""The backends in one table: name, devices, dtypes, and whether each can run here.

Add a backend: one file, one row.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..masks import bitmask, rule
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock
from . import cpu, cuda, triton
from .batch import TensorBatch
from .reference import step

_HALF = (torch.bfloat16, torch.float16)
# (parameter dtype, moment dtype)
_FUSED_DTYPES = (
    *((torch.float32, moments) for moments in (torch.float32, torch.bfloat16)),
    *((dtype, moments) for dtype in _HALF for moments in (torch.float32, dtype)),
)
_ANY_DTYPES = (
    *_FUSED_DTYPES,
    *((torch.float64, moments) for moments in (torch.float64, torch.float32)),
    *((dtype, dtype) for dtype in (torch.complex64, torch.complex128)),
)


KeepMask = Callable[[MaskPlan, int, int, RowBlock, int, torch.Tensor | None, torch.device], torch.Tensor]
BucketPlanes = Callable[[int, int, RowBlock, int, torch.device], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to carry out one step.

    Args:
        name: what ``backend=`` and GRADDROP_BACKEND call it.
        summary: one line for ``info``.
        devices: device types, or None for any.
        dtypes: (parameter dtype, moment dtype) pairs; with master weights the masters' dtype.
        automatic: whether ``"auto"`` may pick it; the first such row that fits is picked.
        unavailable: () -> None when it can run on this machine, else the reason and the remedy.
        masked_adamw_: the step on a TensorBatch, in place.
        sum_of_squares: (batch, masked) -> float64 tensor (), the sum of the gradients' squares.
        mask_gradients_: masks the gradients of a TensorBatch in place, and changes nothing else: what a masked step
            would take for its moments, rounded to the gradients' dtype. A dropped block becomes 0, frozen or not. Only
            gradients, ``steps`` (completed ones), masks and layouts are read. ``maximize`` is False: the sign is the
            step's.
        keep_mask: makes a drawn or fixed mask for ``keep_mask`` below; None if it makes masks only inside of a step.
        bucket_planes: makes bit-planes for ``bucket_planes`` below; None if it makes none.
        by_address: whether it takes addresses, so that tensors must be contiguous or dense in a MemoryOrder. Else it
            takes any strides, and orders mean nothing to it.
        capturable: whether a CUDA graph can hold its step, whose tables are then DeviceTables.
        draws_in_order: whether it can draw masks for a MemoryOrder that is a transposition. Stored masks and dropped
            blocks work in any.
    """

    name: str
    summary: str
    devices: tuple[str, ...] | None
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    automatic: bool
    unavailable: Callable[[], str | None]
    masked_adamw_: Callable[[TensorBatch], None]
    sum_of_squares: Callable[[TensorBatch, bool], torch.Tensor]
    mask_gradients_: Callable[[TensorBatch], None]
    keep_mask: KeepMask | None = None
    bucket_planes: BucketPlanes | None = None
    by_address: bool = True
    capturable: bool = False
    draws_in_order: bool = False

    def misfit(self, device: torch.device, param_dtype: torch.dtype, moment_dtype: torch.dtype) -> str | None:
        """The reason why it cannot step such a tensor, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"works on {' and '.join(self.devices)} tensors, not on {device.type}"
        if (param_dtype, moment_dtype) not in self.dtypes:
            return f"does not take {_short(param_dtype)} parameters with {_short(moment_dtype)} moments"
        return self.unavailable()


def _keep_mask(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, mask_words: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    keep, _ = rule.keep_and_bucket(plan, key, completed_steps, layout, numel, mask_words, device)
    assert keep is not None, "drawn and fixed masks only"
    return keep


def _bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device: torch.device) -> torch.Tensor:
    drawn = rule.by_runs(layout, numel, device, lambda *run: bitmask.element_buckets(key, buckets, *run))
    return bitmask.pack_buckets(drawn, buckets)


BACKENDS = (
    Backend(
        "cpu", "C++, one pass over memory",
        ("cpu",), _FUSED_DTYPES, True, cpu.unavailable, cpu.masked_adamw_, cpu.sum_of_squares,
        cpu.mask_gradients_,
        bucket_planes=lambda key, buckets, layout, numel, _: cpu.bucket_planes(key, buckets, layout, numel),
        draws_in_order=True,
    ),
    Backend(
        "triton", "Triton, one launch for any number of tensors",
        triton.DEVICES, _FUSED_DTYPES, True, triton.unavailable, triton.masked_adamw_,
        triton.sum_of_squares, triton.mask_gradients_, triton.keep_mask, triton.bucket_planes, capturable=True,
    ),
    Backend(
        "cuda", "C++ for CUDA, the same headers as the CPU kernels",
        ("cuda",), _FUSED_DTYPES, True, cuda.unavailable, cuda.masked_adamw_, cuda.sum_of_squares,
        cuda.mask_gradients_, cuda.keep_mask, cuda.bucket_planes, capturable=True,
    ),
    Backend(
        "reference", "plain PyTorch, slow; defines the meaning",
        None, _ANY_DTYPES, True, lambda: None, step.masked_adamw_,
        step.sum_of_squares, step.mask_gradients_, _keep_mask, _bucket_planes, by_address=False,
    ),
    Backend(
        "exact", "the reference with every fma rounded once: the bits of the fused backends",
        None, _ANY_DTYPES, False, lambda: None, partial(step.masked_adamw_, exact=True),
        partial(step.sum_of_squares, exact=True), partial(step.mask_gradients_, exact=True), by_address=False,
    ),
)  # fmt: skip
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the preferred first. ``"reference"`` and ``"exact"`` always
    can. Which one steps a tensor depends on its device and dtypes too, see ``python -m graddrop_kernels info``.
    """
    return tuple(backend.name for backend in BACKENDS if backend.unavailable() is None)


def check_name(name: str, given_as: str = "backend") -> str:
    """Returns the name. Raises ValueError for one that is neither a backend's nor "auto", and RuntimeError, with the
    remedy, for one that cannot run here. ``given_as``: the argument or environment variable that the name comes from.
    """
    if name != "auto":
        if name not in _BY_NAME:
            known = ", ".join(map(repr, _BY_NAME))
            raise ValueError(f"{given_as}={name!r} is unknown; choose 'auto' or one of {known}")
        reason = _BY_NAME[name].unavailable()
        if reason:
            raise RuntimeError(f"{given_as}={name!r} cannot run here: {reason}")
    return name


def select(name: str, device: torch.device, param_dtype: torch.dtype, moment_dtype: torch.dtype) -> Backend:
    """The backend for one batch.

    ``"auto"`` takes the first that fits. GRADDROP_BACKEND overrides ``"auto"``. A named one that does not fit raises.
    """
    mode = device, param_dtype, moment_dtype
    given_as = "backend"
    if name == "auto":
        name, given_as = os.environ.get("GRADDROP_BACKEND") or "auto", "GRADDROP_BACKEND"
    if name == "auto":
        fitting = (backend for backend in BACKENDS if backend.automatic and not backend.misfit(*mode))
        backend = next(fitting, None)
        if backend is None:
            raise TypeError(
                f"no backend takes {_short(param_dtype)} parameters with {_short(moment_dtype)} moments "
                f"on {device.type}; float32, float64, bfloat16, float16, complex64 and complex128 are supported"
            )
        return backend
    check_name(name, given_as)
    reason = _BY_NAME[name].misfit(*mode)
    if reason:
        raise RuntimeError(f"{given_as}={name!r} {reason}; use {given_as}='auto'")
    return _BY_NAME[name]


def _running_on(device: torch.device) -> Iterator[Backend]:
    """The backends that can run on tensors of a device, the preferred first."""
    fitting = (backend for backend in BACKENDS if backend.devices is None or device.type in backend.devices)
    return (backend for backend in fitting if backend.unavailable() is None)


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device: torch.device) -> torch.Tensor:
    """The bit-planes of a parameter's buckets (bitmask.pack_buckets), made by the fastest backend that can run on the
    device.
    """
    make = next(backend.bucket_planes for backend in _running_on(device) if backend.bucket_planes)
    return make(key, buckets, layout, numel, device)


def keep_mask(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, mask_words: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """The bool keep mask of a plan, shape (numel,), made by the fastest backend that can run on the device."""
    if plan.kind not in ("bernoulli", "bucket", "fixed"):
        return torch.full((numel,), plan.kind != "off", dtype=torch.bool, device=device)
    make = next(backend.keep_mask for backend in _running_on(device) if backend.keep_mask)
    return make(plan, key, completed_steps, layout, numel, mask_words, device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
