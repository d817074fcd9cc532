"""Builds csrc into plain shared libraries beside the Python files. All metadata is in pyproject.toml.

csrc includes no header of torch or Python. So one library serves every torch >= 2.10 and every Python, and a build
needs only a C++ compiler. A missing or failing compiler is not an error: the package installs, runs on the PyTorch
reference, and `python -m graddrop_kernels info` says so.

Environment variables:
  CXX, NVCC: the compilers.
  GRADDROP_NO_EXT=1: builds nothing.
  GRADDROP_NO_CUDA=1: leaves the CUDA library out.
  GRADDROP_FORCE_CUDA=1: turns a missing or failing nvcc into an error. Without a GPU it builds for every GPU.
  GRADDROP_CUDA_ARCHS: lists the architectures, "80;90" for example. PTX of the last one is added.

In this list "native" stands for the GPUs that are here, and "all" for one architecture of each generation that torch is
built for and nvcc knows. Code for 80 also runs on 86 and 89, code for 100 on 103, code for 120 on 121, and the PTX on
later GPUs. The default is "native", so without a GPU no CUDA code is compiled. In a wheel it is "all", since a wheel
may travel; pip install without -e makes one.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
HEADERS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))]
# Every fma is written out, so contraction is off. The same source then gives the same bits with every compiler and
# instruction set.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
]
# Device code is fully optimised by default. -O1 is for the host code, where the emulation for the tests is large.
# --threads=0 compiles as many architectures at the same time as there are cores.
NVCC_FLAGS = [
    "-std=c++17",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-O1",
    "--threads=0",
]
CUDA_ARCHS = ("80", "90", "100", "120")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {
    "csrc/cpu/kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "csrc/cpu/kernels_avx512.cpp": AVX512,
    "csrc/cpu/kernels_avx2.cpp": AVX2,
}
CPU_SOURCES = ["csrc/cpu/masked_adamw.cpp", "csrc/cpu/kernels_portable.cpp"]
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_SOURCES += ISA_FLAGS
CUDA_SOURCES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/*.cu"))]


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_nvcc() -> str | None:
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return (
        os.environ.get("NVCC")
        or shutil.which("nvcc")
        or next((shutil.which("nvcc", path=f"{home}/bin") for home in toolkits if home), None)
    )


def gpu_archs() -> set[str]:
    """The compute capabilities of the GPUs that are here, as "90" for 9.0. Empty without a driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    return {"".join(numbers) for numbers in re.findall(r"^(\d+)\.(\d)", told, re.MULTILINE)}


def cuda_options(asked: str) -> list[str]:
    """nvcc's options for a list of architectures written as in GRADDROP_CUDA_ARCHS; [] if there is no architecture."""
    entries = {entry.strip() for entry in asked.split(";")} - {""}
    archs = entries - {"all", "native"} | (gpu_archs() if "native" in entries else set())
    if not archs and "all" not in entries:
        return []
    listed = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = sorted((name.removeprefix("compute_") for name in listed), key=generation)
    if "all" in entries:
        archs |= {arch for arch in CUDA_ARCHS if arch in known or not known} or {known[-1]}
    machine = sorted((arch for arch in archs if arch in known or not known), key=generation)
    portable = set(machine[-1:])
    for arch in archs.difference(machine):
        older = [name for name in known if name.isdigit() and generation(name) < generation(arch)]
        say(f"nvcc does not know sm_{arch}: " + (f"PTX of compute_{older[-1]} instead" if older else "left out"))
        portable |= set(older[-1:])
    codes = [(arch, f"sm_{arch}") for arch in machine]
    codes += [(arch, f"compute_{arch}") for arch in sorted(portable, key=generation)]
    if not codes:
        return []
    # Without commas, blanks and quotation marks, which nvcc would interpret itself.
    told = "-DGRADDROP_CUDA_ARCHITECTURES=" + "+".join(code for _, code in codes)
    return [told, *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes)]


def generation(arch: str) -> int:
    return int(arch.rstrip("af"))  # 90a: for 9.0 only


def say(line: str) -> None:
    """Prints a line, which pip shows only with -v. It is flushed, since the next action can take minutes."""
    print(f"graddrop_kernels: {line}", flush=True)


class BuildLibraries(build_ext):
    """Calls the compilers directly, with one process per source. setuptools knows no flags per source, and torch's own
    build_ext refuses nvcc beside a CPU-only torch.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # loaded by ctypes: no Python tag

    def run(self) -> None:
        if switched_on("GRADDROP_NO_EXT"):
            say("GRADDROP_NO_EXT is set; nothing compiled, the PyTorch reference will run")
            return
        super().run()

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name.endswith("_cuda")
        required = cuda and switched_on("GRADDROP_FORCE_CUDA")
        try:
            if cuda and not find_nvcc():
                raise FileNotFoundError("nvcc not found (set NVCC or CUDA_HOME)")
            self.compile(extension, cuda)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            if required:
                raise RuntimeError(
                    f"GRADDROP_FORCE_CUDA is set, but {extension.name} cannot be built: {error}"
                ) from error
            say(f"{extension.name} not built ({error}); the package works without it")

    def default_archs(self) -> str:
        everywhere = "bdist_wheel" in self.distribution.commands
        return "all" if everywhere or (switched_on("GRADDROP_FORCE_CUDA") and not gpu_archs()) else "native"

    def compile(self, extension: Extension, cuda: bool) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        compiler = [*cxx, *CXX_FLAGS]
        if cuda:
            options = cuda_options(os.environ.get("GRADDROP_CUDA_ARCHS") or self.default_archs())
            if not options:
                raise ValueError("no GPU that nvcc has code for; GRADDROP_CUDA_ARCHS=all builds for every GPU")
            compiler = [find_nvcc(), *NVCC_FLAGS, *options]
        objects = Path(self.build_temp) / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        command, done = shlex.join([*compiler, *extension.sources]), objects / "command"
        up_to_date = not newer_group([*extension.sources, *extension.depends], library, missing="newer")
        if up_to_date and not self.force and done.exists() and done.read_text() == command:
            return say(f"{extension.name} is up to date")
        done.unlink(missing_ok=True)
        seconds = 30 * (len(options) - 1) if cuda else 60
        say(f"compiling {extension.name}, about {seconds} s on two cores")

        def compile_one(source: str) -> str:
            target = str(objects / (Path(source).name + ".o"))
            subprocess.run([*compiler, *ISA_FLAGS.get(source, []), "-c", source, "-o", target], check=True, cwd=ROOT)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, extension.sources))
        library.parent.mkdir(parents=True, exist_ok=True)
        # The architectures again, else nvcc adds a stub for the oldest one that it knows.
        linker = [find_nvcc(), *options, "-shared"] if cuda else [*cxx, "-shared"]
        subprocess.run([*linker, *compiled, "-o", str(library)], check=True, cwd=ROOT)
        done.write_text(command)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# optional: an extension that was not built is not copied to its place either.
SHARED = {"depends": [*HEADERS, "setup.py"], "optional": True}
extensions = [Extension("graddrop_kernels._cpu", CPU_SOURCES, **SHARED)]
if CUDA_SOURCES and not switched_on("GRADDROP_NO_CUDA") and (find_nvcc() or switched_on("GRADDROP_FORCE_CUDA")):
    extensions.append(Extension("graddrop_kernels._cuda", CUDA_SOURCES, **SHARED))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel})
