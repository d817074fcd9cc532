"""`python -m graddrop_kernels info`: what is installed, what runs here, what a step uses."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__, backends
from ..backends import cpu, cuda

_OPTIONAL = ("triton", "transformers", "numpy")  # looked up, not imported: importing transformers takes seconds
_DRIVER_FACTS = Path("/proc/driver/nvidia/version")  # Linux
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if gpus and cuda.architectures():
        print(f"  {cuda.unavailable() or 'it has code for the GPU, and the driver is new enough for it'}")
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
    found = cuda.architectures()
    if found:
        machine = ", ".join(each for each in found if each.startswith("sm_"))
        portable = " and ".join(f"PTX of {each}" for each in found if not each.startswith("sm_"))
        return f"_cuda.so for {' and '.join(filter(None, (machine, portable)))}"
    if shutil.which(_nvcc()) is None:
        return "not built (needs nvcc at pip install)"
    return "not built, for lack of a GPU at pip install; for every GPU: GRADDROP_CUDA_ARCHS=all pip install ..."


def _compilers() -> dict[str, str]:
    """Returns {program that setup.py looks for: path and version, or why it is not found}."""
    cxx = shlex.split(os.environ.get("CXX", "c++"))[:1] or ["c++"]
    return {"c++": _compiler(cxx[0], "set CXX"), "nvcc": _compiler(_nvcc(), "set NVCC or CUDA_HOME")}


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("NVCC") or shutil.which("nvcc") or f"{home}/bin/nvcc"


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
