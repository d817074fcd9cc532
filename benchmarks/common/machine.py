"""Facts about the machine of a measurement: processor, versions, commit, load."""

import json
import os
import platform
import re
import shlex
import subprocess
import time
from pathlib import Path

import torch

import graddrop_kernels
from graddrop_kernels.backends import cpu

from .gpu_facts import gpu_facts

ROOT = Path(__file__).resolve().parents[2]
_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
# The code that a figure depends on.
_CODE = ("csrc", "graddrop_kernels", "setup.py", *(f"benchmarks/{part}" for part in ("common", "cpu", "gpu", "xglue")))


def facts() -> dict:
    """Returns facts that do not change while a benchmark runs, as plain JSON values; None for unknown ones."""
    cpuinfo = _cpuinfo()
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "family": _number(cpuinfo.get("cpu family"), int),
        "model": _number(cpuinfo.get("model"), int),
        "cores": os.cpu_count(),
        "mhz_now": _number(cpuinfo.get("cpu MHz")),
        "mhz_max": _mhz_max(),
        "caches": _caches(),
        "virtual": "hypervisor" in cpuinfo.get("flags", "").split(),
        "isa_flags": [flag for flag in _FLAGS if flag in (cpuinfo.get("flags") or cpuinfo.get("Features", "")).split()],
        "memory_gib": _memory_gib(),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiler": _compiler(),
        "graddrop_kernels": graddrop_kernels.__version__,
        "isas": list(cpu.available_isas()),
        "kernels_older_than_csrc": _kernels_are_stale(),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("GRADDROP_COMMIT"),  # for a copy without .git
        "dirty": bool(_git("status", "--porcelain", "--", *_CODE)),
        "gpu": gpu_facts(),
        "cuda_kernels_older_than_csrc": _kernels_are_stale("_cuda.so", (".h", ".cu", ".cuh")),
    }


def slug(machine: dict) -> str:
    """Names the machine's folder: "amd-epyc-f25-m17-2-cores". Virtual machines call several processors by one name."""
    parts = [machine["cpu"]]
    if machine["family"] is not None:
        parts.append(f"f{machine['family']} m{machine['model']}")
    parts.append(f"{machine['cores']} cores")
    name = re.sub(r"\((r|tm)\)", "", " ".join(parts).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def gpu_slug(machine: dict) -> str:
    """Names the folder of results on the GPU: "nvidia-h200"; "no-gpu" for a rehearsal without one."""
    name = machine["gpu"]["name"] if machine["gpu"] else "no gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Load:
    """The machine's load from here on. ``elsewhere`` should be near 0: others take bandwidth even from a free core."""

    def __init__(self):
        self.before, self.started = _load_average(), time.monotonic()
        self.busy_before, self.own_before = _busy_seconds(), _own_seconds()

    def report(self, helpers: float = 0.0) -> dict:
        """Returns load averages before and now (1 minute; ours counts too), and how many cores others used in
        between. ``helpers``: CPU seconds of processes that are ours and no children, as those of a forkserver.
        """
        elsewhere = None
        if self.busy_before is not None:
            busy, own = _busy_seconds() - self.busy_before, _own_seconds() - self.own_before + helpers
            elsewhere = round(max(0.0, busy - own) / max(time.monotonic() - self.started, 1e-9), 3)
        return {"before": self.before, "after": _load_average(), "elsewhere": elsewhere}


def _cpuinfo() -> dict[str, str]:
    """Returns the first processor of /proc/cpuinfo; empty on systems other than Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _number(text: str | None, kind: type = float) -> float | int | None:
    return kind(text) if text else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(path: str) -> str | None:
    """Returns the word in brackets, as in "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", _read(path) or "")
    return found[1] if found else None


def _mhz_max() -> float | None:
    khz = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return float(khz) / 1000 if khz else None


def _caches() -> dict[str, str]:
    """Returns the caches of the first core: {"L1 data": "32K", ...}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(folder / name)) for name in ("level", "type", "size"))
        if kind in ("Data", "Unified"):
            found[f"L{level}{' data' if kind == 'Data' else ''}"] = size
    return found


def _memory_gib() -> float | None:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return round(int(found[1]) / 2**20, 1) if found else None


def _compiler() -> str | None:
    """Names the C++ compiler that setup.py would call."""
    try:
        command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _kernels_are_stale(library: str = "_cpu.so", suffixes: tuple[str, ...] = (".h", ".cpp")) -> bool | None:
    """Says whether csrc was edited after the kernels were compiled. Then the commit does not describe them."""
    library = Path(graddrop_kernels.__file__).with_name(library)
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    if not library.exists() or not sources:
        return None
    return library.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _own_seconds() -> float:
    """Returns the CPU seconds of this process and of its finished children."""
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """Returns the CPU seconds used since boot on all cores; None on systems other than Linux. /proc/stat counts clock
    ticks.
    """
    fields = (_read("/proc/stat") or "").split("\n")[0].split()[1:9]
    if len(fields) < 8:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(facts(), indent=1))
