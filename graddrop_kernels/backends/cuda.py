"""The cuda backend: csrc/cuda through its C functions, on CUDA tensors.

Each function has an emulation in the same library, which runs the same source thread after thread on the host. On CPU
tensors the functions below call it. It shows where there is no GPU that the kernels' logic is right. It is no backend
for CPUs.
"""

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..masks.bitmask import num_planes, num_words
from ..masks.plan import MaskPlan
from ..masks.row_block import RowBlock
from .batch import TensorBatch
from .device_tables import DeviceTables
from .launches import Launch
from .tensor_table import DTYPES, MASK_KINDS, TABLE_VERSION, TensorRow

_LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"
_FUNCTIONS = {  # without the stream, which is the last argument of each
    "prologue": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32),
    "masked_adamw": (c_void_p,),
    "mask_gradients": (c_void_p,),
    "sum_of_squares": (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
    "keep_mask": (c_void_p, c_void_p, c_void_p),
    "bucket_planes": (c_void_p, c_int64, c_int64, c_void_p),
}


class LaunchSpec(ctypes.Structure):
    """As in csrc/tensor_table.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("rows", "step_rows", "by_age", "chunks", "grad_scale", "clip_factor")),
        *((name, c_int64) for name in ("num_chunks", "age_stride")),
        *((name, c_int32) for name in (
            "param_dtype", "grad_dtype", "moment_dtype", "stochastic",
            "kind", "planes", "aligned", "amsgrad", "frozen", "update", "cautious", "ages",
        )),
    ]  # fmt: skip


class MaskSpec(ctypes.Structure):
    """As in csrc/mask.h."""

    _fields_ = [
        *((name, c_int32) for name in ("kind", "masked")),
        *((name, c_uint32) for name in ("threshold", "draw", "buckets", "first_bucket", "last_bucket")),
        ("num_planes", c_int32),
        ("key", c_uint64),
        ("scale", ctypes.c_float),
    ]


assert ctypes.sizeof(LaunchSpec) == 112 and ctypes.sizeof(MaskSpec) == 48


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, the reason why there is none). Tried once."""
    if not _LIBRARY.exists():
        return None, (
            "csrc/cuda was not compiled, for lack of nvcc or a GPU; install the CUDA toolkit and run pip install "
            "again, without a GPU with GRADDROP_CUDA_ARCHS=all (GRADDROP_FORCE_CUDA=1 says what is missing)"
        )
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        version = library.graddrop_cuda_table_version()
        for name, arguments in _FUNCTIONS.items():
            for form in (f"graddrop_cuda_{name}", f"graddrop_cuda_emulate_{name}"):
                getattr(library, form).argtypes = [*arguments, c_void_p]
        library.graddrop_cuda_runtime_version.argtypes = library.graddrop_cuda_driver_version.argtypes = []
        library.graddrop_cuda_error.restype = library.graddrop_cuda_architectures.restype = c_char_p
    except (OSError, AttributeError) as error:
        return None, f"{_LIBRARY.name} cannot be used: {error}; run pip install again"
    if version != TABLE_VERSION:
        return None, (
            f"{_LIBRARY.name} was built from other sources (table version {version}, not {TABLE_VERSION}); "
            "run pip install again"
        )
    return library, None


def unavailable() -> str | None:
    """None when the kernels can run on one of the GPUs here, else the reason and the remedy."""
    reason = _load()[1]
    if reason:
        return reason
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install one with CUDA from pytorch.org"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return _unfit()


@lru_cache(maxsize=1)
def _unfit() -> str | None:
    reasons = list(map(misfit, range(torch.cuda.device_count())))
    return None if None in reasons else reasons[0]


def misfit(index: int) -> str | None:
    """None when the library has code that this GPU and the driver can run, else the reason and the remedy. The library
    must be there.
    """
    facts: Any = torch.cuda  # untyped
    return why_unfit(facts.get_device_capability(index), architectures(), *versions())


def versions() -> tuple[int, int]:
    """CUDA's versions as 1000 * major + 10 * minor: (the library was built with, the driver supports). The library must
    be there.
    """
    library: Any = _load()[0]
    return library.graddrop_cuda_runtime_version(), library.graddrop_cuda_driver_version()


def why_unfit(capability: tuple[int, int], architectures: list[str], built_with: int, driver: int) -> str | None:
    """The reason why a library for these architectures does not run on a GPU of this compute capability, or None.

    Machine code runs on the same major capability, from its minor one on, under any driver of the same major version
    of CUDA. PTX runs on every newer GPU, if the driver is as new as the compiler that wrote it.
    """
    if driver // 1000 < built_with // 1000:
        return (
            f"the driver supports CUDA up to {_told(driver)}, and {_LIBRARY.name} was built with {_told(built_with)}; "
            "update the driver, or run pip install again with an older CUDA toolkit"
        )
    fitting = [code for code in architectures if _is_for(code, capability)]
    if any(code.startswith("sm_") for code in fitting):
        return None
    gpu = ".".join(map(str, capability))
    if not fitting:
        return (
            f"{_LIBRARY.name} is for {', '.join(architectures)}, and this GPU has compute capability {gpu}; run pip "
            f"install again with GRADDROP_CUDA_ARCHS={gpu.replace('.', '')}"
        )
    if driver < built_with:
        return (
            f"{_LIBRARY.name} has only PTX for this GPU of compute capability {gpu}, from CUDA {_told(built_with)}, "
            f"and the driver supports CUDA up to {_told(driver)}; update the driver, or run pip install again with "
            f"GRADDROP_CUDA_ARCHS={gpu.replace('.', '')}"
        )
    return None


def _told(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _is_for(code: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_90", "compute_90", "sm_90a" or the like can run on a GPU of this compute capability."""
    kind, _, number = code.partition("_")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return (major, minor) == capability
    if kind == "sm" or number.endswith("f"):
        return major == capability[0] and minor <= capability[1]
    return (major, minor) <= capability


def architectures() -> list[str]:
    """The architectures of the library: "sm_90" for machine code, "compute_90" for PTX. Empty without a library."""
    library, _ = _load()
    told: bytes = library.graddrop_cuda_architectures() if library else b""
    return told.decode().split("+") if told else []


def _call(name: str, device: torch.device, *arguments: object) -> None:
    """Runs a C function on the current stream of a device, or its emulation on the CPU.

    Raises:
        RuntimeError: no library, or the launch failed.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the cuda backend cannot run: {reason}")
    if device.type == "cpu":
        error = getattr(library, f"graddrop_cuda_emulate_{name}")(*arguments, None)
    else:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            error = getattr(library, f"graddrop_cuda_{name}")(*arguments, stream)
    if error:
        raise RuntimeError(
            f"csrc/cuda: {name} cannot be launched on {device}: {library.graddrop_cuda_error(error).decode()}"
        )


def masked_adamw_(batch: TensorBatch) -> None:
    """Makes one masked AdamW step on the batch, in place. One launch computes the scalars. Then there is one launch per
    mask kind and alignment.
    """
    tables = DeviceTables.of(batch)
    _prologue(tables, tables.age_stride, batch.found_inf, advance=True)
    for launch in tables.launches:
        spec = _launch_spec(batch, tables, launch)
        _call("masked_adamw", batch.device, ctypes.addressof(spec))


def sum_of_squares(batch: TensorBatch, masked: bool) -> torch.Tensor:
    """The sum of the squares of all gradients of the batch: float64 of shape (), on its device. The host does not wait.

    Neither ``grad_scale`` nor ``clip_factor`` is applied. ``masked``: the gradients are masked as in the next step, so
    dropped ones count as 0 and kept ones are multiplied by their scale. The step counts do not change. The same
    gradients give the same bits.
    """
    tables = DeviceTables.of(batch, for_norm=True)
    launches = tables.launches_of_norm(masked)
    total, first = sum(launch.chunks.numel() for launch in launches), 0
    out = (torch.empty if total else torch.zeros)((), dtype=torch.float64, device=batch.device)
    with tables.places(total) as (sums, arrived):
        if masked:
            _prologue(tables, 0, None, advance=False)
        for launch in launches:
            spec = _launch_spec(batch, tables, launch)
            _call(
                "sum_of_squares", batch.device, ctypes.addressof(spec), masked,
                sums.data_ptr(), arrived.data_ptr(), out.data_ptr(), first, total,
            )  # fmt: skip
            first += spec.num_chunks
    return out


def mask_gradients_(batch: TensorBatch) -> None:
    """Masks the gradients of the batch in place. After the prologue there is one launch per mask kind and alignment."""
    tables = DeviceTables.of(batch)
    launches = tables.launches_of_masks(batch.hypers)
    if launches:
        _prologue(tables, 0, None, advance=False)
    for launch in launches:
        spec = _launch_spec(batch, tables, launch)
        _call("mask_gradients", batch.device, ctypes.addressof(spec))


def _prologue(tables: DeviceTables, age_stride: int, found_inf: torch.Tensor | None, advance: bool) -> None:
    """Writes the step rows, unless age_stride is 0 the table by age, and with ``advance`` the step counts."""
    _call(
        "prologue", tables.device,
        tables.rows.data_ptr(), tables.num_rows, tables.hypers.data_ptr(), tables.step_rows.data_ptr(),
        tables.by_age.data_ptr(), age_stride, _address(found_inf), advance,
    )  # fmt: skip


def _launch_spec(batch: TensorBatch, tables: DeviceTables, launch: Launch) -> LaunchSpec:
    return LaunchSpec(
        rows=tables.rows.data_ptr(),
        step_rows=tables.step_rows.data_ptr(),
        by_age=tables.by_age.data_ptr(),
        chunks=launch.chunks.data_ptr(),
        grad_scale=_address(batch.grad_scale),
        clip_factor=_address(batch.clip_factor),
        num_chunks=launch.chunks.numel(),
        age_stride=tables.age_stride,
        param_dtype=DTYPES[batch.param_dtype],
        grad_dtype=DTYPES[batch.grad_dtype or batch.param_dtype],
        moment_dtype=DTYPES[batch.moment_dtype],
        stochastic=batch.stochastic,
        kind=MASK_KINDS[launch.kind],
        planes=launch.planes >= 0,
        aligned=launch.aligned,
        amsgrad=launch.amsgrad,
        frozen=launch.frozen,
        update=launch.update,
        cautious=launch.cautious,
        ages=launch.ages,
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def keep_mask(
    plan: MaskPlan, key: int, completed_steps: int, layout: RowBlock, numel: int, mask_words: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """The keep mask of a layout's elements in local order, as in rule.keep_and_bucket: bool tensor (numel,).

    ``mask_words``: bit-planes or the bits of a fixed mask, on the device.
    """
    draw = 0 if plan.kind == "bucket" else completed_steps if plan.draw is None else plan.draw
    spec = MaskSpec(
        kind=MASK_KINDS[plan.kind], threshold=plan.threshold, draw=draw & 0xFFFFFFFF, buckets=plan.buckets,
        first_bucket=plan.first_bucket, last_bucket=plan.last_bucket,
        num_planes=num_planes(plan.buckets) if plan.bitpacked else -1,
    )  # fmt: skip
    row = _row(key, layout, numel, mask_words)
    keep = torch.empty(numel, dtype=torch.bool, device=device)
    _call("keep_mask", keep.device, ctypes.addressof(row), ctypes.addressof(spec), keep.data_ptr())
    return keep


def bucket_planes(key: int, buckets: int, layout: RowBlock, numel: int, device: torch.device) -> torch.Tensor:
    """The buckets of a layout's elements as bit-planes (bitmask.pack_buckets):
    int32 tensor of shape (num_planes(buckets), num_words(numel)).
    """
    planes = torch.empty(num_planes(buckets), num_words(numel), dtype=torch.int32, device=device)
    row = _row(key, layout, numel)
    _call("bucket_planes", planes.device, ctypes.addressof(row), buckets, planes.size(0), planes.data_ptr())
    return planes


def _row(key: int, layout: RowBlock, numel: int, mask_words: torch.Tensor | None = None) -> TensorRow:
    return TensorRow(
        numel=numel, base=layout.base, local_inner=layout.local_inner, global_inner=layout.global_inner, key=key,
        mask_words=_address(mask_words),
    )  # fmt: skip
