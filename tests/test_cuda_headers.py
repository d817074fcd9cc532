"""The shared headers compile for the device, without spills. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(nvcc is None, reason="nvcc not found: the CUDA sources were not compiled")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_headers_compile_for_the_device(arch, tmp_path):
    flags = ["-O3", "-std=c++17", "-fmad=false", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, *flags, "-cubin", CSRC / "cuda" / "masked_adamw.cu", "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and all(pair == ("0", "0") for pair in spills), done.stderr
