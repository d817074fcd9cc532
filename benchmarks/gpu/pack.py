"""Makes gpu-pack/: what a run on a GPU machine would else compile there, of at most 50 MB.

    _cpu.so, _cuda.so     the libraries; CUDA code for one architecture
    triton/               Triton's cache, filled
    pack.json             what it is of, by which benchmarks.gpu decides whether to use it

Triton finds a kernel by its own version, as a build for one Python. So the cache is filled by the GPU machine's Python
and Triton, in an environment that is made for it, takes 6 GB and is deleted. Without such a Python the pack has no
cache.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .packed import FACTS, FOLDER, KERNELS, LIBRARIES, ROOT, digest_of_sources

PYTHON, TORCH, TRITON, ARCHITECTURE = "3.12", "2.11.0", "3.6.0", "9.0"  # of the machine with the H200
LARGEST = 50e6  # bytes


def find_python(version: str) -> str | None:
    """Returns a Python of this version, or None."""
    places = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"))
    for found in filter(None, (shutil.which(f"python{version}"), *map(str, places))):
        if subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def build_libraries(folder: Path, architecture: str) -> None:
    """Compiles the libraries, from nothing, so that the CUDA one holds one architecture only."""
    environment = {**os.environ, "GRADDROP_CUDA_ARCHS": architecture.replace(".", ""), "GRADDROP_FORCE_CUDA": "1"}
    with tempfile.TemporaryDirectory() as build:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", f"{build}/lib", "--build-temp", build]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        for name in LIBRARIES:
            shutil.copy2(Path(build, "lib", "graddrop_kernels", name), folder / name)


def fill_cache(folder: Path, python: str, torch: str, triton: str, architecture: str, seed: int) -> None:
    """Compiles the kernels with this Python, torch and Triton, into ``folder``."""
    with tempfile.TemporaryDirectory() as made:
        subprocess.run([python, "-m", "venv", made], check=True)
        python = f"{made}/bin/python"
        packages = [f"torch=={torch}", f"triton=={triton}", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-compile", *packages], check=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
        environment |= {"TRITON_STORE_BINARY_ONLY": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [python, "-m", "benchmarks.gpu.pack_kernels", "--seed", str(seed)]
        command += ["--architecture", architecture.replace(".", "")]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for source in folder.rglob("*.source"):  # half of the bytes, and read by nobody
        source.unlink()


def commit() -> str:
    """Returns the commit, with a mark if there are changes: the GPU machine has no repository to ask."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--python", default=PYTHON, help=f"of the GPU machine (default: {PYTHON})")
    parser.add_argument("--torch", default=TORCH, help=f"of the GPU machine (default: {TORCH})")
    parser.add_argument("--triton", default=TRITON, help=f"of the GPU machine (default: {TRITON})")
    parser.add_argument("--architecture", default=ARCHITECTURE, help=f"compute capability (default: {ARCHITECTURE})")
    parser.add_argument("--no-cache", action="store_true", help="libraries only")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    facts = {"commit": commit(), "architecture": options.architecture, "sources": digest_of_sources()}
    print("compiling the libraries", flush=True)
    build_libraries(options.output, options.architecture)
    python = find_python(options.python)
    if options.no_cache or python is None:
        print("no cache of Triton's" + ("" if options.no_cache else f": there is no Python {options.python} here"))
    else:
        facts |= {"python": options.python, "triton": options.triton, "seed": secrets.randbits(31)}
        print(f"filling Triton's cache with Python {options.python}, Triton {options.triton}", flush=True)
        target = options.output / KERNELS
        fill_cache(target, python, options.torch, options.triton, options.architecture, facts["seed"])
        facts["kernels"] = sum(1 for _ in target.glob("*/*.cubin"))
    (options.output / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output.name}: {size / 1e6:.1f} MB, {facts}")
    if size > LARGEST:
        print(f"larger than {LARGEST / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
