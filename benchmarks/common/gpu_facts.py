"""Facts about the GPU of a measurement and its software. Reads only: no setting of the GPU is touched."""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

_TOLD = {  # fields of nvidia-smi: our name and its name
    "driver": "driver_version",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz_max": "clocks.max.memory",
    "sm_mhz_now": "clocks.sm",
    "memory_mhz_now": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def gpu_facts() -> dict | None:
    """Describes the first CUDA device and what compiles for it, as plain JSON values; None if torch sees no device."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    l2_bytes = getattr(properties, "L2_cache_size", None)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": l2_bytes and round(l2_bytes / 2**20, 1),
        "cuda_runtime": torch.version.cuda or torch.version.hip,
        "triton": _installed("triton") or _installed("pytorch-triton-rocm"),
        "nvcc": nvcc_release(),
        **parse_nvidia_smi(_ask_nvidia_smi()),
    }


def parse_nvidia_smi(line: str | None) -> dict[str, float | str | None]:
    """Parses comma-separated values in the order of the fields asked for; None for what the driver does not report."""
    values = [value.strip() for value in line.split(",")] if line else []
    found = dict(zip(_TOLD, values)) if len(values) == len(_TOLD) else dict.fromkeys(_TOLD)
    return {name: value if name == "driver" else _number(value) for name, value in found.items()}


def nvcc_release() -> str | None:
    """Returns "release 13.0, V13.0.48" of the CUDA compiler that setup.py would call."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [None, *(f"{home}/bin" for home in homes if home)]  # None: PATH
    found = [os.environ.get("NVCC"), *(shutil.which("nvcc", path=folder) for folder in folders)]
    nvcc = next(filter(None, found), "nvcc")
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release.*", output)
    return release[0] if release else None


def _ask_nvidia_smi() -> str | None:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_TOLD.values())}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # "[N/A]"
        return None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(gpu_facts(), indent=1))
