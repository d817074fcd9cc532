"""Compiles C++ into shared libraries, once: they are kept in a folder that git ignores, by the hash of all that they
are made of.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[2] / ".ptx-cache"
# Each fma is written out. Kernels are compiled for a second's run: the compiler is what costs.
FLAGS = shlex.split("-std=c++20 -shared -fPIC -w -ffp-contract=off -fno-math-errno -fno-strict-aliasing -fwrapv")
KERNEL, MACHINE = ("-O0",), ("-O2",)


def compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


@cache
def _version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def library(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The compiled source."""
    command = [*compiler(), *FLAGS, *options, f"-I{HERE}"]
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    parts = (source, headers, shlex.join(command), _version())
    path = CACHE / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # other processes compile the same
            made = Path(folder) / "made.so"
            subprocess.run([*command, "-x", "c++", "-", "-o", str(made)], input=source, text=True, check=True)
            made.rename(path)
    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL if options == MACHINE else ctypes.RTLD_LOCAL)


@cache
def machine() -> ctypes.CDLL:
    return library((HERE / "machine.cpp").read_text(), MACHINE)
