"""Builds csrc into plain shared libraries beside the Python files; all metadata is in pyproject.toml.

csrc includes no header of torch or Python, so one library serves every torch >= 2.10 and every Python, and a C++
compiler is all that a build needs. No compiler, or one that fails, is not an error: the package installs, runs on the
PyTorch reference, and `python -m graddrop_kernels info` says so.

Environment: CXX, NVCC name the compilers; GRADDROP_NO_EXT=1 builds nothing; GRADDROP_NO_CUDA=1 leaves the CUDA library
out; GRADDROP_FORCE_CUDA=1 turns a missing or failing nvcc into an error; GRADDROP_CUDA_ARCHS="80;90" lists the
architectures (PTX of the last one is added). The default is one of each generation that torch is built for and nvcc
knows: code for 80 runs on 86 and 89 too, code for 100 on 103, code for 120 on 121, the PTX on what is still to come.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADERS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))]
# Every fma is written out, so contraction is off:
# the same source gives the same bits with every compiler and instruction set.
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
# Device code is optimised fully without being told; -O1 is for the host, where the emulation for the tests is large.
# --threads=0: as many architectures at the same time as there are cores.
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


def cuda_archs() -> list[str]:
    archs = [arch for arch in os.environ.get("GRADDROP_CUDA_ARCHS", "").split(";") if arch]
    if not archs:
        listed = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed] or ["80"]
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs] + [
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    ]


class BuildLibraries(build_ext):
    """Calls the compilers directly, one process a source:
    setuptools knows no flags per source, torch's own build_ext refuses nvcc beside a CPU-only torch.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # loaded by ctypes: no Python tag

    def run(self) -> None:
        if switched_on("GRADDROP_NO_EXT"):
            print("graddrop_kernels: GRADDROP_NO_EXT is set; nothing compiled, the PyTorch reference will run")
            return
        super().run()

    def build_extension(self, extension: Extension) -> None:
        cuda = extension.name.endswith("_cuda")
        required = cuda and switched_on("GRADDROP_FORCE_CUDA")
        try:
            if cuda and not find_nvcc():
                raise FileNotFoundError("nvcc not found (set NVCC or CUDA_HOME)")
            self.compile(extension, cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            if required:
                raise RuntimeError(
                    f"GRADDROP_FORCE_CUDA is set, but {extension.name} cannot be built: {error}"
                ) from error
            print(f"graddrop_kernels: {extension.name} not built ({error}); the package works without it")

    def compile(self, extension: Extension, cuda: bool) -> None:
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        compiler = [find_nvcc(), *NVCC_FLAGS, *cuda_archs()] if cuda else [*cxx, *CXX_FLAGS]
        objects = Path(self.build_temp) / extension.name
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(objects / (Path(source).name + ".o"))
            subprocess.run([*compiler, *ISA_FLAGS.get(source, []), "-c", source, "-o", target], check=True, cwd=ROOT)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, extension.sources))
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        linker = [find_nvcc(), "-shared"] if cuda else [*cxx, "-shared"]
        subprocess.run([*linker, *compiled, "-o", str(library)], check=True, cwd=ROOT)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


extensions = [Extension("graddrop_kernels._cpu", CPU_SOURCES, depends=HEADERS)]
if CUDA_SOURCES and not switched_on("GRADDROP_NO_CUDA") and (find_nvcc() or switched_on("GRADDROP_FORCE_CUDA")):
    extensions.append(Extension("graddrop_kernels._cuda", CUDA_SOURCES, depends=HEADERS))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel})
