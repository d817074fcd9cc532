"""`python -m graddrop_kernels`: what info prints, exit codes, what verify and bench are given; nothing heavy starts."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import graddrop_kernels
from graddrop_kernels import backends
from graddrop_kernels.backends import cpu, cuda
from graddrop_kernels.tools import cli
from graddrop_kernels.tools import info as info_command


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    for name in ("GRADDROP_BACKEND", "GRADDROP_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments, **environment):
    command = [sys.executable, "-m", "graddrop_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def info(capsys):
    assert cli.main(["info"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def line_of(lines, *start):
    """The one line that begins with these words."""
    found = [line for line in lines if line.split()[: len(start)] == list(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


def test_info_in_a_process_of_its_own():
    result = run("info")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"graddrop_kernels {graddrop_kernels.__version__}" in result.stdout
    assert f"Python {sys.version.split()[0]}" in result.stdout


def test_an_unknown_command_exits_with_2_and_the_usage():
    result = run("explode")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        "usage: python -m graddrop_kernels" in result.stderr
        and "'explode'" in result.stderr
        and "info" in result.stderr
    )


def test_no_command_exits_with_2_and_the_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "usage: python -m graddrop_kernels" in capsys.readouterr().err


def test_versions_threads_and_instruction_set(capsys, monkeypatch):
    monkeypatch.setattr(info_command, "version", {"numpy": "7.8.9", "transformers": "4.5.6"}.__getitem__)
    monkeypatch.setattr(info_command, "PackageNotFoundError", KeyError)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    lines = info(capsys)
    assert f"torch {torch.__version__}, triton not installed, transformers 4.5.6, numpy 7.8.9" in lines
    cpu_line = line_of(lines, "CPU:")
    assert "77 of" in cpu_line
    assert (f"instruction set {cpu.isa()}" if cpu.unavailable() is None else "no compiled kernels") in cpu_line


def test_info_imports_nothing_heavy():
    code = (
        "import sys; from graddrop_kernels.tools.cli import main; assert main(['info']) == 0; "
        "print(sorted({'triton', 'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_backend_of_the_table_is_listed(capsys):
    lines = info(capsys)
    for backend in backends.BACKENDS:
        line = next(line for line in lines[lines.index("backends:") :] if line.split()[0] == backend.name)
        assert backend.summary in line
        assert ("runs here" in line) == (backend.name in backends.available_backends())


def test_a_missing_library_is_named_with_its_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    cpu._load.cache_clear()
    try:
        lines = info(capsys)
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()
    place = lines.index("backends:") + 1
    assert lines[place].split()[:3] == ["cpu", "cannot", "run"]
    assert "install a C++ compiler and run pip install again" in lines[place + 1]
    assert "no compiled kernels" in line_of(lines, "CPU:")
    picked = line_of(lines, "cpu", "float32")
    assert "reference" in picked and "install a C++ compiler" in picked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_what_auto_picks_and_why(capsys, dtype):
    line = line_of(info(capsys), "cpu", dtype)
    if dtype == "float64":
        assert line.split()[2] == "reference" and "cpu: does not take float64 parameters with float64 moments" in line
    elif cpu.unavailable() is None:
        assert line.split()[2] == "cpu" and "cpu:" not in line
    else:
        assert line.split()[2] == "reference" and f"cpu: {cpu.unavailable()}" in line


def test_the_first_row_that_fits_needs_no_other_reason(capsys, monkeypatch):
    reference = next(backend for backend in backends.BACKENDS if backend.name == "reference")
    monkeypatch.setattr(backends, "BACKENDS", (reference,))
    assert (
        line_of(info(capsys), "cpu", "float16").split(maxsplit=2)[2]
        == "reference (the first in the table, and it fits)"
    )


def test_the_environment_override_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("GRADDROP_BACKEND", "exact")
    lines = info(capsys)
    assert any("GRADDROP_BACKEND=exact overrides it" in line for line in lines)
    assert line_of(lines, "cpu", "bfloat16").split() == ["cpu", "bfloat16", "exact"]


def test_a_wrong_environment_override_is_explained(capsys, monkeypatch):
    monkeypatch.setenv("GRADDROP_BACKEND", "gpu")
    line = line_of(info(capsys), "cpu", "float32")
    assert "none: GRADDROP_BACKEND='gpu' is unknown" in line and "'reference'" in line


@pytest.fixture
def two_gpus(monkeypatch):
    properties = lambda i: types.SimpleNamespace(total_memory=(8 + i) * 2**30, multi_processor_count=7 + i)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Accelerator {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def test_facts_of_the_gpus(capsys, monkeypatch, two_gpus):
    monkeypatch.setattr(info_command, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(info_command, "version", lambda package: "7.8.9")
    lines = info(capsys)
    place = lines.index("GPU:")
    assert lines[place + 1 : place + 4] == [
        "  cuda:0   Accelerator 0, compute capability 9.0, 8 GiB, 7 multiprocessors",
        "  cuda:1   Accelerator 1, compute capability 9.1, 9 GiB, 8 multiprocessors",
        "  driver 580.65.06, torch built for CUDA 13.0, triton 7.8.9",
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert "  driver 580.65.06, torch built for ROCm 6.4.1, triton 7.8.9" in info(capsys)


def test_without_a_gpu_it_says_what_torch_was_built_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for number, text in (("12.9", "torch built for CUDA 12.9"), (None, "torch built without CUDA and ROCm")):
        monkeypatch.setattr(torch.version, "cuda", number)
        monkeypatch.setattr(torch.version, "hip", None)
        assert f"GPU: none that torch can use ({text})" in info(capsys)


@pytest.mark.parametrize(
    "text, number",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x@y)\n", "580.65.06"),
        (None, "570.1"),
    ],
    ids=["closed", "open", "nvidia-smi"],
)  # fmt: skip
def test_the_drivers_version(text, number, monkeypatch, tmp_path):
    told = tmp_path / "version"
    if text:
        told.write_text(text)
    monkeypatch.setattr(info_command, "_DRIVER_FACTS", told)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert info_command._driver() == number


def test_a_driver_that_nothing_tells_of(monkeypatch, tmp_path):
    monkeypatch.setattr(info_command, "_DRIVER_FACTS", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info_command._driver() == "unknown"


def test_architectures_of_the_library_that_was_built(capsys):
    """Against NVIDIA's own tool, which triton brings along."""
    spec = importlib.util.find_spec("triton")
    tool = spec and Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not cuda.architectures() or not tool or not tool.exists():
        pytest.skip("needs a library built by nvcc, and triton for its cuobjdump")
    command = [str(tool), "--list-elf", "--list-ptx", str(Path(cuda.__file__).resolve().parents[1] / "_cuda.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    machine, portable = (set(re.findall(rf"sm_(\d+)\w?\.{kind}", listed)) for kind in ("cubin", "ptx"))
    assert machine | portable
    assert set(cuda.architectures()) == {f"sm_{arch}" for arch in machine} | {f"compute_{arch}" for arch in portable}
    assert all(f"sm_{arch}" in line_of(info(capsys), "CUDA", "library:") for arch in machine)


@pytest.mark.parametrize("found, nvcc, text", [
    (["sm_80", "sm_90", "compute_90"], True, "_cuda.so for sm_80, sm_90 and PTX of compute_90"),
    (["compute_100"], True, "_cuda.so for PTX of compute_100"),
    ([], False, "not built (needs nvcc at pip install)"),
    ([], True, "not built, for lack of a GPU at pip install; for every GPU: GRADDROP_CUDA_ARCHS=all pip install ..."),
])  # fmt: skip
def test_whether_the_cuda_library_is_there(found, nvcc, text, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "architectures", lambda: found)
    monkeypatch.setenv("NVCC", sys.executable if nvcc else "no-such-nvcc")
    assert f"CUDA library: {text}" in info(capsys)


@pytest.mark.parametrize("reason", [None, "the driver is too old for the library; update the driver"])
def test_whether_the_library_fits_the_gpu_and_its_driver(reason, capsys, monkeypatch, two_gpus):
    monkeypatch.setattr(cuda, "architectures", lambda: ["sm_90"])
    monkeypatch.setattr(cuda, "unavailable", lambda: reason)
    lines = info(capsys)
    said = lines[lines.index("CUDA library: _cuda.so for sm_90") + 1]
    assert said == f"  {reason or 'it has code for the GPU, and the driver is new enough for it'}"
    monkeypatch.setattr(cuda, "architectures", lambda: [])
    assert said not in info(capsys)


def test_cuda_is_asked_too_where_there_is_one(capsys, two_gpus):
    lines = info(capsys)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        chosen = backends.select("auto", torch.device("cuda"), getattr(torch, dtype), getattr(torch, dtype)).name
        assert line_of(lines, "cuda", dtype).split()[2] == chosen != "cpu"
    assert "cpu: works on cpu tensors, not on cuda" in line_of(
        lines, "cuda", "float64"
    )  # which only the reference takes


def test_compilers_that_are_there_and_that_are_not(capsys, monkeypatch, tmp_path):
    compiler = tmp_path / "mycxx"
    compiler.write_text("#!/bin/sh\necho 'My C++ compiler'\necho 'version 12.34'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -fsomething")
    monkeypatch.setenv("NVCC", str(tmp_path / "nosuch"))
    lines = info(capsys)
    assert f"  c++  {compiler}: version 12.34" in lines
    assert line_of(lines, "nvcc").endswith("nosuch not found (set NVCC or CUDA_HOME)")


def test_a_compiler_that_does_not_run_is_no_error(capsys, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "does not run" in line_of(info(capsys), "c++")


# verify and bench: what they are given; what they do is tested in files of their own.


@pytest.fixture
def called(monkeypatch):
    """What `verify` and `bench` were called with; both return 5."""
    calls = []
    for name, place in {"verify": "verify.command", "bench": "bench"}.items():
        module = types.ModuleType(f"graddrop_kernels.tools.{place}")
        setattr(module, name, lambda *arguments, name=name: calls.append((name, *arguments)) or 5)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["verify"], ("verify", None, None, None, False, None)),
        (
            ["verify", "--device", "cpu", "--backend", "reference", "--seed", "12", "--quick", "--seconds", "2.5"],
            ("verify", "cpu", "reference", 12, True, 2.5),
        ),
        (["bench"], ("bench", None, False)),
        (["bench", "--device", "cpu", "--quick"], ("bench", "cpu", True)),
    ],
    ids=["verify", "verify with all", "bench", "bench with all"],
)
def test_arguments_reach_the_commands_and_their_exit_codes_the_caller(arguments, expected, called):
    assert cli.main(arguments) == 5
    assert called == [expected]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["verify", "--backend", "gpu"], ["--backend", "'gpu'", "reference"]),
        (["verify", "--device", "moon"], ["--device", "'moon'"]),
        (["bench", "--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["verify", "--seed", "x"], ["--seed", "'x'"]),
        (["verify", "--seconds", "x"], ["--seconds", "'x' is no number of seconds above 0"]),
        (["verify", "--seconds", "0"], ["--seconds", "'0' is no number of seconds above 0"]),
    ],
    ids=["backend", "device of verify", "device of bench", "seed", "seconds", "no seconds"],
)
def test_bad_arguments_exit_with_2_and_name_what_is_wrong(arguments, parts, called, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and not called
    assert all(part in error for part in parts), error
    assert "Traceback" not in error and len(error.splitlines()[-1]) < 300
