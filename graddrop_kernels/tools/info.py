"""`python -m graddrop_kernels info | verify | bench`; `info`: what is installed, what runs here, what a step uses."""

import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__, backends
from ..backends import cpu

_OPTIONAL = ("triton", "transformers", "numpy")  # looked up, not imported: importing transformers takes seconds
_CUDA_LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"
_DRIVER_FACTS = Path("/proc/driver/nvidia/version")  # Linux
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Imported on demand: `info` has to work even if one of these is broken.


def info() -> int:
    """Prints what a bug report needs. Returns 0, even if no compiled backend can run."""
    print(f"graddrop_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, {', '.join(f'{name} {_installed(name)}' for name in _OPTIONAL)}")
    isa = f"instruction set {cpu.isa()}" if cpu.unavailable() is None else "no compiled kernels"
    print(f"CPU: {cpu.processor()}, {isa}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    print("GPU:" if gpus else f"GPU: none that torch can use ({_torch_gpu_build()})")
    for index in gpus:
        print(f"  cuda:{index:<4}{_gpu(index)}")
    if gpus:
        print(f"  driver {_driver()}, {_torch_gpu_build()}, triton {_installed('triton')}")
    print(f"CUDA library: {_cuda_library()}")
    print("compilers (needed for pip install only):")
    for compiler, command in _compilers().items():
        print(f"  {compiler:<5}{command}")
    print("backends:")
    width = max(len(backend.name) for backend in backends.BACKENDS) + 2
    for backend in backends.BACKENDS:
        reason = backend.unavailable()
        print(f"  {backend.name:<{width}}{'runs here' if reason is None else 'cannot run':<12}{backend.summary}")
        if reason is not None:
            print(f"  {'':<{width}}{reason}")
    override = os.environ.get("GRADDROP_BACKEND")
    print("backend='auto' picks" + (f" (GRADDROP_BACKEND={override} overrides it):" if override else ":"))
    for device in ("cpu", "cuda") if gpus else ("cpu",):
        for dtype in _DTYPES:
            print(f"  {device:<5}{str(dtype).removeprefix('torch.'):<10}{_picked(torch.device(device), dtype)}")
    return 0


def _picked(device: torch.device, dtype: torch.dtype) -> str:
    """Names the backend for parameters and moments of this dtype, and says why none before it in the table."""
    try:
        chosen = backends.select("auto", device, dtype, dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"none: {error}"
    if (os.environ.get("GRADDROP_BACKEND") or "auto") != "auto":
        return chosen.name
    passed = backends.BACKENDS[: backends.BACKENDS.index(chosen)]
    reasons = [f"{backend.name}: {backend.misfit(device, dtype, dtype)}" for backend in passed if backend.automatic]
    return f"{chosen.name} ({'; '.join(reasons) or 'the first in the table, and it fits'})"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return (
        f"{torch.cuda.get_device_name(index)}, compute capability {capability}, {facts.total_memory / 2**30:.0f} GiB, "
        f"{facts.multi_processor_count} multiprocessors"
    )


def _torch_gpu_build() -> str:
    for name, number in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if number:
            return f"torch built for {name} {number}"
    return "torch built without CUDA and ROCm"


def _driver() -> str:
    """Returns the GPU driver's version, from the kernel module or from nvidia-smi."""
    told = _DRIVER_FACTS.read_text() if _DRIVER_FACTS.exists() else ""
    found = re.search(r"Kernel Module.*?\s([0-9][0-9.]+)\s", told)
    if found:
        return found[1]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.splitlines()[0].strip() if told.strip() else "unknown"


def _cuda_library() -> str:
    """Says whether csrc/cuda was compiled, and for which architectures."""
    if not _CUDA_LIBRARY.exists():
        return "not built (needs nvcc at pip install)"
    machine, portable = cuda_architectures(_CUDA_LIBRARY.read_bytes())
    parts = [", ".join(f"sm_{arch}" for arch in machine), "".join(f"PTX of compute_{arch}" for arch in portable)]
    return f"{_CUDA_LIBRARY.name} for {' and '.join(filter(None, parts)) or 'no architecture'}"


def cuda_architectures(library: bytes) -> tuple[list[int], list[int]]:
    """Returns (compute capabilities with machine code, with PTX) of a library built by nvcc, 90 for 9.0.

    They are listed in fat binaries: a header (u32 magic, u16 version, u16 its size, u64 size of all that follows), then
    entries. Each entry begins with u16 kind (1 PTX, 2 machine code), u16 version, u32 header size, u64 payload size,
    and has the architecture as the u32 at byte 28. NVIDIA does not document this. nvcc 13.0 writes it so, and a test
    compares the result with cuobjdump.
    """
    found: dict[int, set[int]] = {1: set(), 2: set()}
    for header in re.finditer(rb"\x50\xed\x55\xba\x01\x00\x10\x00(?s:.{8})", library):
        place = header.end()
        end = min(place + int.from_bytes(header[0][8:], "little"), len(library))
        while place + 32 <= end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", library, place)
            if kind not in found or not entry_header:
                break
            found[kind].add(struct.unpack_from("<I", library, place + 28)[0])
            place += entry_header + payload
    return sorted(found[2]), sorted(found[1])


def _compilers() -> dict[str, str]:
    """Returns {program that setup.py looks for: path and version, or why it is not found}."""
    cxx = shlex.split(os.environ.get("CXX", "c++"))[:1] or ["c++"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or f"{home}/bin/nvcc"
    return {"c++": _compiler(cxx[0], "set CXX"), "nvcc": _compiler(nvcc, "set NVCC or CUDA_HOME")}


def _compiler(command: str, remedy: str) -> str:
    path = shutil.which(command)
    if path is None:
        return f"{command} not found ({remedy})"
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    numbered = (line for line in output.splitlines() if re.search("[0-9][.][0-9]", line))
    return f"{path}: {next(numbered, 'unknown version')}"
