"""What `make gpu-pack` has compiled elsewhere, for a GPU machine whose minutes are few. Imports no torch."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "gpu-pack"
FACTS, KERNELS = "pack.json", "triton"
LIBRARIES = ("_cpu.so", "_cuda.so")  # loaded by ctypes: no Python's tag in their names
SOURCES = ("csrc", "setup.py")


def digest_of_sources() -> str:
    """Identifies what the libraries are compiled from."""
    files = [path for name in SOURCES for path in (sorted((ROOT / name).rglob("*")) or [ROOT / name])]
    digest = hashlib.sha256()
    for path in filter(Path.is_file, files):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


class Pack:
    """The folder GRADDROP_GPU_PACK, by default gpu-pack/. Without one, or with one of other sources, its members say so
    and bring nothing.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or Path(os.environ.get("GRADDROP_GPU_PACK") or FOLDER)
        found = self.folder / FACTS
        self.facts: dict = json.loads(found.read_text()) if found.exists() else {}
        self._cache: Path | None = None

    def use(self, libraries: bool, cache: Path) -> tuple[dict[str, str], list[str]]:
        """Returns (environment of the run's processes, lines that say what is used and what not).

        Args:
            libraries: whether to put the libraries beside the package.
            cache: a folder to which Triton's is copied, as it will grow.
        """
        if not self.facts:
            return {}, [f"no pack in {self.folder.name}/: kernels are compiled when needed (make gpu-pack makes one)"]
        lines = [f"pack: {', '.join(f'{name} {value}' for name, value in self.facts.items() if name != 'sources')}"]
        environment = {"GRADDROP_COMMIT": self.facts["commit"] or ""}
        if (self.folder / KERNELS).exists():
            self._cache = cache
            shutil.copytree(self.folder / KERNELS, self._cache, dirs_exist_ok=True)
            environment["TRITON_CACHE_DIR"] = str(cache)
        if libraries:
            lines += self._place_libraries()
        return environment, lines

    def _place_libraries(self) -> list[str]:
        if self.facts["sources"] != digest_of_sources():
            return ["its libraries are of other sources and not used; make gpu-pack anew"]
        here, made = _compute_capability(), self.facts["architecture"]
        if here != made:
            return [f"its libraries are for compute capability {made}, and this is {here}: not used"]
        for name in LIBRARIES:
            shutil.copy2(self.folder / name, ROOT / "graddrop_kernels" / name)
        return [f"{' and '.join(LIBRARIES)} are the pack's"]

    def kernels(self) -> dict[str, int] | None:
        """Counts Triton's compiled kernels that came with the pack, and those that the run has added; None without."""
        if self._cache is None:
            return None
        count = lambda folder: sum(1 for _ in folder.glob("*/*.cubin"))
        packed = count(self.folder / KERNELS)
        return {"packed": packed, "added": count(self._cache) - packed}


def _compute_capability() -> str | None:
    try:
        query = ["nvidia-smi", "-i", "0", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
