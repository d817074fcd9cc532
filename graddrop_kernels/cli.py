"""`python -m graddrop_kernels info`: what is installed, which backends can run here, and which one a step would use."""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, backends
from .backends import cpu

_OPTIONAL = ("triton", "transformers", "numpy")  # looked up, never imported: transformers takes seconds
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code; a command that does not exist exits with 2 and the usage."""
    parser = argparse.ArgumentParser(
        prog="python -m graddrop_kernels", description="GradDrop inside one fused AdamW step."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    commands.add_parser("info", help="versions, compilers, backends, and which one is picked").set_defaults(run=info)
    return parser.parse_args(argv).run()


def info() -> int:
    """Print what a bug report needs. Returns 0, also where no compiled backend can run."""
    print(f"graddrop_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, {', '.join(f'{name} {_installed(name)}' for name in _OPTIONAL)}")
    isa = f"instruction set {cpu.isa()}" if cpu.unavailable() is None else "no compiled kernels"
    print(f"CPU: {_cpu_model()}, {isa}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    gpus = (
        [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    print(f"GPU: {', '.join(gpus) or 'none that torch can use'}")
    print("compilers (needed for pip install only):")
    for compiler, command in _compilers().items():
        print(f"  {compiler:<5}{command}")
    print("backends:")
    for backend in backends.BACKENDS:
        reason = backend.unavailable()
        print(f"  {backend.name:<11}{'runs here' if reason is None else 'cannot run':<12}{backend.summary}")
        if reason is not None:
            print(f"  {'':<11}{reason}")
    override = os.environ.get("GRADDROP_BACKEND")
    print("backend='auto' picks" + (f" (GRADDROP_BACKEND={override} overrides it):" if override else ":"))
    for device in ("cpu", "cuda") if gpus else ("cpu",):
        for dtype in _DTYPES:
            print(f"  {device:<5}{str(dtype).removeprefix('torch.'):<10}{_picked(torch.device(device), dtype)}")
    return 0


def _picked(device: torch.device, dtype: torch.dtype) -> str:
    """The backend of parameters of a dtype with moments of the same one, and why none before it in the table."""
    try:
        chosen = backends.select("auto", device, dtype, dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"none: {error}"
    if os.environ.get("GRADDROP_BACKEND", "auto") != "auto":
        return chosen.name
    passed = backends.BACKENDS[: backends.BACKENDS.index(chosen)]
    reasons = [f"{backend.name}: {backend.misfit(device, dtype, dtype)}" for backend in passed if backend.automatic]
    return f"{chosen.name} ({'; '.join(reasons) or 'the first in the table, and it fits'})"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _compilers() -> dict[str, str]:
    """{what setup.py looks for: path and version, or why it is not found}."""
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
