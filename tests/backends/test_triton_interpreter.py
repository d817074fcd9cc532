"""The triton backend in Triton's interpreter, on CPU tensors, bit for bit against the reference.

The interpreter must be chosen before Triton is imported, so these tests run the others in a process of their own:
every policy on tensors of more than one program, every kind of mask x dtype x shard, any alignment, any bit pattern,
gradients that are masked in place.
The compiled kernels are looked at in test_triton_contract.py.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SELECTIONS = {
    "kernels": ["backends/test_triton_kernels.py"],
    "masks": ["backends/test_mask_gradients.py"],
    "policies": ["backends/test_backends_agree.py", "-k", "on_long_tensors"],
    "values": ["backends/test_backends_agree.py", "-k", "bit_pattern or signed_zeros or stay or alignment or infin"],
    "modes": ["step/test_mixed_precision.py", "step/test_clipping.py", "-k", "triton and not fast and not float64"],
    "shards": ["backends/test_layout.py", "-k", "slices_of_the_whole or far_shards"],
}

LONG = ("masks", "policies", "values", "modes", "shards")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "selection", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SELECTIONS]
)
def test_in_the_interpreter(selection, seed, request):
    """A part of each long table, another one every run, by the seed."""
    count = request.config.getoption("sample") or (0 if selection == "kernels" else 20)
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "GRADDROP_TEST_BACKENDS": "triton", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--sample={count}"]
    command += ["-W", "ignore::RuntimeWarning", *SELECTIONS[selection]]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0, f"{selection} in the interpreter: see the output of the inner pytest above"
    assert " passed" in run.stdout and " skipped" not in run.stdout.splitlines()[-1]
