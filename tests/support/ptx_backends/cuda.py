"""The cuda backend, with the PTX that nvcc has put into its library."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from ptx.kernel import Kernel
from ptx.parse import Module

from graddrop_kernels.backends import cuda
from graddrop_kernels.backends.tensor_table import DTYPES, MASK_KINDS, TensorRow

from .emulation import Emulation

THREADS, PROLOGUE_THREADS = 256, 32  # csrc/cuda/chunks.h and masks.cu, masked_adamw.cu
BFLOAT16, FLOAT16 = "NS_8BFloat16E", "NS_7Float16E"  # as in the names of kernels
_TYPES = {DTYPES[torch.float32]: "f", DTYPES[torch.bfloat16]: BFLOAT16, DTYPES[torch.float16]: FLOAT16}
_KINDS = {number: kind for kind, number in MASK_KINDS.items()}
# Variant of csrc/cuda/thread_mask.h: of a mask kind, and what is added to it for frozen elements and for ages
_VARIANTS = {"gaussian": 1, "bernoulli": 2, "bucket": 4, "fixed": 6, "planes": 6}
_OF_UPDATE = {"bernoulli": 8, "bucket": 9, "fixed": 10, "planes": 10}


def cuobjdump() -> str | None:
    triton = find_spec("triton")
    own = triton and shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return own or shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")


def missing() -> str | None:
    """What there is no PTX for the lack of, or None."""
    if not cuda._LIBRARY.exists():
        return "_cuda.so was not built; make test does so where nvcc is"
    if not cuobjdump():
        return "cuobjdump is needed, to read PTX out of _cuda.so: it comes with triton and with the CUDA toolkit"
    return None if _modules() else "_cuda.so was built without PTX; make test builds it with"


@cache
def _modules() -> list[str]:
    listing = subprocess.run([cuobjdump(), "-ptx", str(cuda._LIBRARY)], capture_output=True, text=True, check=True)
    return re.findall(r"^\.version.*?(?=^Fatbin|\Z)", listing.stdout, re.DOTALL | re.MULTILINE)


@cache
def _kernels(change: Callable[[str], str]) -> dict[str, tuple[Module, str]]:
    """{name without abbreviations: (module, name)}."""
    found = {}
    for module in map(Module, map(change, _modules())):
        for name in module.entries:
            half = re.search(rf"{BFLOAT16}|{FLOAT16}", name)
            found[re.sub(r"S\d_", half[0], name) if half else name] = module, name
    return found


@cache
def kernel(part: str, change: Callable[[str], str] = str) -> Kernel:
    """The one kernel whose name has this part."""
    ((module, name),) = (each for name, each in _kernels(change).items() if part in name)
    return Kernel(module, name)


class CudaEmulation(Emulation):
    def __init__(self, seed: int, change: Callable[[str], str] = str):
        super().__init__("cuda as PTX", cuda, seed, change)

    @contextmanager
    def launched(self) -> Iterator[None]:
        with mock.patch.object(cuda, "_call", lambda name, device, *arguments: getattr(self, name)(*arguments)):
            yield

    def _launch(self, part: str, blocks: int, *arguments: object, threads: int = THREADS, spans=()) -> None:
        if blocks:
            self.launch(kernel(part, self.change), blocks, threads, [value or 0 for value in arguments], spans)

    # The functions that cuda.py calls, each with its launch in csrc/cuda.

    def prologue(self, rows, num_rows, hypers, step_rows, by_age, age_stride, found_inf, advance) -> None:
        arguments = rows, hypers, step_rows, by_age, age_stride, found_inf, int(advance)
        self._launch("15prologue_kernel", num_rows, *arguments, threads=PROLOGUE_THREADS)

    def masked_adamw(self, address: int) -> None:
        spec = cuda.LaunchSpec.from_address(address)
        half = _TYPES[spec.param_dtype]
        moments = _TYPES[spec.moment_dtype]
        gradients = _TYPES[spec.grad_dtype] if half == "f" else half
        types = f"NS_5TypesI{half}{gradients}{moments}Li{spec.stochastic}EE"
        part = f"14general_kernelI{types}"
        if spec.aligned and not (spec.amsgrad and spec.cautious):
            how = f"{_variant(spec)}ELb{int(spec.amsgrad)}ELb{int(spec.cautious)}E"
            part = f"14aligned_kernelILNS_7VariantE{how}{types}"
        self._launch(part, spec.num_chunks, bytes(spec))

    def sum_of_squares(self, address: int, masked, sums, arrived, out, first, total) -> None:
        spec = cuda.LaunchSpec.from_address(address)
        gradients = _TYPES[spec.grad_dtype]
        part = f"19general_norm_kernelI{gradients}E"
        if spec.aligned:
            part = f"19aligned_norm_kernelILNS_7VariantE{_variant(spec, of_step=False)}E{gradients}E"
        places = b"".join(value.to_bytes(8, "little") for value in (sums, arrived, out, first, total))
        self._launch(part, spec.num_chunks, bytes(spec), int(masked), places, spans=[(out, 8)])

    def mask_gradients(self, address: int) -> None:
        spec = cuda.LaunchSpec.from_address(address)
        part = f"20general_masks_kernelI{_TYPES[spec.grad_dtype]}E"
        if spec.aligned:
            variant = _variant(spec, of_step=False)
            part = f"20aligned_masks_kernelILNS_7VariantE{variant}E{_TYPES[spec.grad_dtype]}E"
        self._launch(part, spec.num_chunks, bytes(spec))

    def keep_mask(self, row_address: int, mask_address: int, out: int) -> None:
        row, mask = TensorRow.from_address(row_address), cuda.MaskSpec.from_address(mask_address)
        spans = [(out, row.numel)]
        self._launch("16keep_mask_kernel", _blocks(row.numel, 16), bytes(row), bytes(mask), out, spans=spans)

    def bucket_planes(self, row_address: int, buckets: int, planes: int, out: int) -> None:
        row = TensorRow.from_address(row_address)
        spans = [(out, 4 * planes * -(-row.numel // 32))]
        blocks = _blocks(row.numel, 32) if planes else 0
        self._launch("13planes_kernel", blocks, bytes(row), buckets, planes, out, spans=spans)


def _variant(spec: cuda.LaunchSpec, of_step: bool = True) -> int:
    kind = "planes" if spec.planes else _KINDS[spec.kind]
    variant = _VARIANTS.get(kind, 0)
    if not of_step:
        return variant
    if spec.update:
        return _OF_UPDATE[kind]
    return variant + bool(spec.frozen if kind == "bernoulli" else spec.ages and kind in ("bucket", "planes"))


def _blocks(numel: int, of_a_thread: int) -> int:
    return -(-numel // (of_a_thread * THREADS))
