"""The build: setup.py's switches, what wheels and archives hold, what the library exports. In copies of the tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import installed
import pytest

import graddrop_kernels

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = (
    "CXX",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "GRADDROP_NO_EXT",
    "GRADDROP_NO_CUDA",
    "GRADDROP_FORCE_CUDA",
    "GRADDROP_CUDA_ARCHS",
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ONE_STEP = (
    "import torch, graddrop_kernels as g; w = torch.nn.Parameter(torch.ones(9)); w.grad = torch.ones(9); "
    "g.FusedGradDropAdamW([w], weight_decay=0.5).step(); "
    "print(g.__file__, g.available_backends()[0], bool((w != 1).any()))"
)


def copy_of_the_tree(folder):
    built = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "*.egg-info")
    for name in ("csrc", "graddrop_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def source(tmp_path):
    return copy_of_the_tree(tmp_path / "source")


@pytest.fixture
def source_with_cuda(source):
    """The library may or may not have CUDA sources of its own; here it has."""
    (source / "csrc/cuda").mkdir(exist_ok=True)
    (source / "csrc/cuda/planted.cu").write_text('extern "C" int planted() { return 7; }\n')
    return source


def run(command, folder, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=500
    )


def build_ext(source, **environment):
    """setup.py build_ext into build folders of the copy; (result, what was built)."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built", "--build-temp", "objects"]
    result = run(command, source, **environment)
    return result, sorted(str(path.relative_to(source)) for path in source.rglob("*.so"))


def our_lines(result):
    return [line for line in result.stdout.splitlines() if line.startswith("graddrop_kernels:")]


# Switches.


def test_no_ext_compiles_nothing(source):
    result, libraries = build_ext(source, GRADDROP_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    assert libraries == [] and not list(source.rglob("*.o"))
    assert (
        len(our_lines(result)) == 1
        and "GRADDROP_NO_EXT is set; nothing compiled, the PyTorch reference will run" in result.stdout
    )


def test_a_switch_of_0_is_off(source):
    result, _ = build_ext(source, GRADDROP_NO_EXT="0", CXX="no-such-compiler", GRADDROP_NO_CUDA="1")
    assert result.returncode == 0 and "no-such-compiler" in result.stdout


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "no-such-launcher c++"])
def test_a_compiler_that_is_missing_or_fails_is_one_line_and_no_error(source, compiler):
    result, libraries = build_ext(source, CXX=compiler, GRADDROP_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert libraries == []
    lines = [line for line in our_lines(result) if "compiling" not in line]
    assert len(lines) == 1
    assert (
        "graddrop_kernels._cpu not built" in lines[0]
        and compiler.split()[0] in lines[0]
        and "works without it" in lines[0]
    )


def test_without_a_compiler_it_installs_and_steps(source, tmp_path):
    target = tmp_path / "site"
    result = run(
        [*PIP, "install", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target), str(source)],
        tmp_path,
        CXX="no-such-compiler",
        GRADDROP_NO_CUDA="1",
    )
    assert result.returncode == 0, result.stderr
    assert (target / "graddrop_kernels/optimizer.py").exists() and not list(target.rglob("*.so"))
    result = run([sys.executable, "-c", ONE_STEP], tmp_path, PYTHONPATH=str(target))
    assert result.stdout.split() == [str(target / "graddrop_kernels/__init__.py"), "reference", "True"], result.stderr


@pytest.mark.parametrize("missing", ["CUDA_HOME", "NVCC"])
def test_force_cuda_without_nvcc_is_a_clear_error(source_with_cuda, tmp_path, missing):
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    environment = {
        "PATH": str(nowhere),
        "CXX": "no-such-compiler",
        missing: str(nowhere / "nvcc" if missing == "NVCC" else nowhere),
    }
    result, libraries = build_ext(source_with_cuda, GRADDROP_FORCE_CUDA="1", **environment)
    assert result.returncode != 0 and libraries == []
    assert re.search(
        r"RuntimeError: GRADDROP_FORCE_CUDA is set, but graddrop_kernels._cuda cannot be built: .*nvcc", result.stderr
    ), result.stderr
    result, _ = build_ext(source_with_cuda, **environment)  # not forced: left out
    assert result.returncode == 0, result.stderr


def test_force_cuda_with_an_nvcc_that_fails_is_a_clear_error(source_with_cuda):
    result, _ = build_ext(source_with_cuda, GRADDROP_FORCE_CUDA="1", NVCC="false", CXX="no-such-compiler")
    assert (
        result.returncode != 0
        and "GRADDROP_FORCE_CUDA is set, but graddrop_kernels._cuda cannot be built" in result.stderr
    )
    result, _ = build_ext(source_with_cuda, NVCC="false", CXX="no-such-compiler", GRADDROP_CUDA_ARCHS="80")
    assert result.returncode == 0 and any("graddrop_kernels._cuda not built" in line for line in our_lines(result))


@pytest.fixture
def called(source_with_cuda, tmp_path):
    """Builds with a recording stand-in for nvcc, which knows sm_80 to sm_100, and one for nvidia-smi, with the GPUs
    that it is called with: (what nvcc was told to compile for, our lines).
    """
    nvcc, smi = tmp_path / "nvcc", tmp_path / "nvidia-smi"
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        "[ $1 = --list-gpu-arch ] && echo compute_80 compute_90 compute_90a compute_100 && exit\n"
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    nvcc.chmod(0o755)

    def build(*gpus, command=build_ext, **environment):
        smi.write_text(f"#!/bin/sh\n{'; '.join(f'echo {gpu}' for gpu in gpus) or 'exit 9'}\n")
        smi.chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        result, libraries = command(source_with_cuda, NVCC=str(nvcc), CXX="no-such-compiler", **environment)
        assert result.returncode == 0, result.stderr
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        planted = [line for line in calls if "planted.cu " in line]
        codes = re.findall(r",code=(\S+)", planted[0]) if planted else []
        if planted:
            assert [library for library in libraries if library.endswith("_cuda.so")]
            assert "-fmad=false" in planted[0].split()
            assert f"-DGRADDROP_CUDA_ARCHITECTURES={'+'.join(codes)}" in planted[0].split()
        return codes, our_lines(result)

    return build


@pytest.mark.parametrize("gpus, asked, codes", [
    (("9.0", "9.0"), None, "sm_90 compute_90"),
    (("9.0", "8.0"), None, "sm_80 sm_90 compute_90"),
    ((), "80;90", "sm_80 sm_90 compute_90"),
    (("10.0",), "80", "sm_80 compute_80"),
    (("10.0",), "native;80", "sm_80 sm_100 compute_100"),
    ((), "native;80", "sm_80 compute_80"),
    ((), "90a", "sm_90a compute_90a"),
    (("9.0",), "all", "sm_80 sm_90 sm_100 compute_100"),
])  # fmt: skip
def test_the_cuda_library_is_built_for_the_gpus_that_are_here_or_those_that_are_asked_for(gpus, asked, codes, called):
    environment = {} if asked is None else {"GRADDROP_CUDA_ARCHS": asked}
    assert called(*gpus, **environment)[0] == codes.split()


def test_without_a_gpu_nvcc_does_not_run_and_a_line_says_how_to_ask(called, tmp_path):
    codes, lines = called()
    assert not (tmp_path / "calls").exists()
    assert codes == [] and any("no GPU" in line and "GRADDROP_CUDA_ARCHS=all" in line for line in lines)
    assert called(GRADDROP_FORCE_CUDA="1")[0] == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert called("9.0", GRADDROP_NO_CUDA="1")[0] == []


def test_a_gpu_that_nvcc_does_not_know_gets_the_newest_ptx(called):
    codes, lines = called("12.1", "8.0")
    assert codes == ["sm_80", "compute_80", "compute_100"]
    assert "graddrop_kernels: nvcc does not know sm_121: PTX of compute_100 instead" in lines


def test_a_wheel_is_built_for_every_gpu(called):
    def wheel(source, **environment):
        result = run([sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "wheels"], source, **environment)
        (path,) = (source / "wheels").glob("*.whl")
        return result, [name for name in files_of(path) if name.endswith(".so")]

    assert called("9.0", command=wheel)[0] == ["sm_80", "sm_90", "sm_100", "compute_100"]


def test_what_is_up_to_date_is_not_compiled_again(called):
    assert called("9.0")[0] == ["sm_90", "compute_90"]
    codes, lines = called("9.0")
    assert codes == [] and "graddrop_kernels: graddrop_kernels._cuda is up to date" in lines
    assert called("9.0", "8.0")[0] == ["sm_80", "sm_90", "compute_90"]


# A real build.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(the wheel, the copy of the tree that it was built in). Needs a C++ compiler.

    -O1 halves the time, and leaves more functions out of line for the test of shared code.
    """
    if os.environ.get("GRADDROP_NO_EXT", "0") not in ("", "0"):
        pytest.skip("GRADDROP_NO_EXT is set: nothing is to be compiled")
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_tree(folder / "source")
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O1\n')
    compiler.chmod(0o755)
    command = [
        *PIP,
        "wheel",
        "--verbose",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    result = run(command, folder, CXX=str(compiler), GRADDROP_NO_CUDA="1")
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "not built" not in output, output
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0], source


def files_of(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_tag_of_the_wheel(wheel):
    """One for every Python 3 of a platform: the library includes no header of Python or torch."""
    _, _, *tag = wheel[0].stem.split("-")
    assert tag[:2] == ["py3", "none"] and tag[2] == sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel):
    files = files_of(wheel[0])
    source = wheel[1]
    ours = {
        str(path.relative_to(source))
        for path in (source / "graddrop_kernels").rglob("*")
        if path.suffix in (".py", ".tsv", ".md", ".typed")
    }
    assert sum(name.endswith(".tsv") for name in ours) > 5 and "graddrop_kernels/backends/__init__.py" in ours
    assert ours <= files, "add new packages and data to pyproject.toml"
    assert {"graddrop_kernels/_cpu.so", "graddrop_kernels/py.typed"} <= files
    strangers = {name for name in files - ours - {"graddrop_kernels/_cpu.so"} if ".dist-info/" not in name}
    assert strangers == set()  # no csrc, no objects, no tests
    assert any(name.endswith("licenses/LICENSE") for name in files)


@pytest.mark.slow
def test_the_wheel_steps_on_the_compiled_backend(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path)
    result = run([sys.executable, "-c", ONE_STEP], tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == [str(tmp_path / "graddrop_kernels/__init__.py"), "cpu", "True"], result.stderr


def nm(*arguments):
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not installed")
    output = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in output.splitlines() if line]


@pytest.mark.slow
def test_objects_of_an_instruction_set_share_no_code(wheel):
    """A weak symbol is linked once: an inline function compiled for AVX-512 could run on processors without it."""
    objects = [path for path in wheel[1].rglob("*.o") if re.search("avx|neon|sve", path.name)]
    assert objects or sysconfig.get_platform().split("-")[-1] not in ("x86_64", "amd64")
    for path in objects:
        shared = [symbol for *_, kind, symbol in nm(path) if kind in "WVu"]
        assert not shared, path.name


@pytest.mark.slow
def test_the_library_exports_its_c_functions_only(wheel):
    library = next(wheel[1].rglob("_cpu.so"))
    exported = {
        symbol for _, kind, symbol in nm("-D", "--defined-only", library) if kind not in "WVu"
    }  # weak: instances of the standard library's
    assert {"graddrop_cpu_masked_adamw", "graddrop_cpu_table_version", "graddrop_cpu_isa"} <= exported
    assert all(symbol.startswith("graddrop_cpu_") for symbol in exported)


@pytest.mark.slow
def test_the_library_needs_neither_torch_nor_python(wheel):
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    output = subprocess.run(
        [objdump, "-p", str(next(wheel[1].rglob("_cpu.so")))], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", output)
    assert needed and not [name for name in needed if re.search("torch|python|c10|cuda|gomp|iomp", name)]


def test_the_source_archive_has_all_that_a_build_and_the_tests_need(source_with_cuda):
    """Also the CUDA sources, though this machine may have no nvcc; and the pictures of the README."""
    result = run([sys.executable, "setup.py", "--quiet", "sdist"], source_with_cuda, GRADDROP_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    (path,) = (source_with_cuda / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(source_with_cuda))
        for path in (source_with_cuda / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu")
    } | {
        str(path.relative_to(source_with_cuda))
        for folder in ("tests", "benchmarks")
        for path in (source_with_cuda / folder).rglob("*")
        if path.suffix in (".py", ".md", ".json", ".png", ".h", ".cpp")
    }
    pictures = re.findall(r"\]\((\S+\.png)\)", (ROOT / "README.md").read_text())
    assert pictures and set(pictures) <= files
    assert "csrc/cuda/planted.cu" in wanted and wanted <= files, sorted(wanted - files)
    assert {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "graddrop_kernels/optimizer.py",
        "graddrop_kernels/demo/data/sib200/LICENSE.md",
    } <= files


def test_one_version(source):
    """That of __init__.py, which the build reads without importing it: it may have no torch."""
    init = source / "graddrop_kernels/__init__.py"
    init.write_text(init.read_text().replace(graddrop_kernels.__version__, "7.8.9.dev1"))
    (source / "torch.py").write_text("raise ImportError('a build without torch')")
    result = run([sys.executable, "setup.py", "--version"], source)
    assert result.stdout.split() == ["7.8.9.dev1"], result.stderr
    assert version("graddrop_kernels") == graddrop_kernels.__version__


# As users have it: the wheel installed, the source tree out of reach.


@pytest.mark.slow
def test_the_public_tests_pass_on_the_wheel(wheel):
    """Some of them: `make wheel-test` runs them all."""
    parts = ("optimizer/test_public_api.py", "optimizer/test_optimizer.py", "step/test_masked_semantics.py")
    found = installed.run(wheel[0], arguments=("--sample=1", *parts))
    assert found["failed"] == 0 and found["passed"] > 20 and found["backends"][0] == "cpu"


@pytest.mark.slow
def test_the_package_of_another_place_is_refused(wheel, tmp_path, monkeypatch):
    foreign = tmp_path / "site-packages"
    shutil.copytree(wheel[1] / "graddrop_kernels", foreign / "graddrop_kernels")
    monkeypatch.setattr(installed, "_environment", lambda: {**os.environ, "PYTHONPATH": str(foreign)})
    with pytest.raises(RuntimeError, match="not the wheel's"):
        installed.run(wheel[0])


@pytest.mark.slow
def test_a_users_program_passes_a_strict_type_check(wheel, tmp_path):
    """And its mistakes are found, see typed_user.py. The cache is that of `make lint`: of torch, mostly."""
    own = installed.make_environment(tmp_path / "environment", wheel[0], sys.executable)
    shutil.copy(ROOT / "tests/support/typed_user.py", tmp_path)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--python-executable", own]
    result = run([*command, "--cache-dir", str(ROOT / ".mypy_cache"), "typed_user.py"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
