"""`python -m graddrop_kernels`: what info prints, its exit codes, and that it starts nothing heavy."""

import os
import subprocess
import sys

import pytest
import torch

import graddrop_kernels
from graddrop_kernels import backends, cli
from graddrop_kernels.backends import cpu


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
    monkeypatch.setattr(cli, "version", {"numpy": "7.8.9", "transformers": "4.5.6"}.__getitem__)
    monkeypatch.setattr(cli, "PackageNotFoundError", KeyError)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    lines = info(capsys)
    assert f"torch {torch.__version__}, triton not installed, transformers 4.5.6, numpy 7.8.9" in lines
    cpu_line = line_of(lines, "CPU:")
    assert "77 of" in cpu_line
    assert (f"instruction set {cpu.isa()}" if cpu.unavailable() is None else "no compiled kernels") in cpu_line


def test_info_imports_nothing_heavy():
    code = (
        "import sys; from graddrop_kernels.cli import main; assert main(['info']) == 0; "
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
    assert "none" in line and "'gpu' is unknown" in line and "'reference'" in line


def test_cuda_is_asked_too_where_there_is_one(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Accelerator {index}")
    lines = info(capsys)
    assert "GPU: Accelerator 0, Accelerator 1" in lines
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
