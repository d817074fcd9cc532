"""Compiles the Triton kernels that a run on a GPU launches, into TRITON_CACHE_DIR, on a machine without a GPU.

Needs the Python and the Triton of the GPU machine: both are part of what a compiled kernel is found by. The kernels are
those of the cases of `verify --quick` and of everything that is measured, launched on CPU tensors by no driver.
"""

import argparse
import os
import sys
import time
import warnings

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# The triton backend takes CPU tensors in the interpreter only, which it asks for when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
from graddrop_kernels import backends  # noqa: E402

ROW = next(backend for backend in backends.BACKENDS if backend.name == "triton" and backend.unavailable() is None)
del os.environ["TRITON_INTERPRET"]

from graddrop_kernels.backends.triton.ahead import CompilingDriver, Kernels  # noqa: E402
from graddrop_kernels.tools.verify.cases import make_cases  # noqa: E402
from graddrop_kernels.tools.verify.run_case import Engine, launch_case  # noqa: E402

from ..common.cases import CASES, make_optimizer  # noqa: E402
from ..common.modes import TABLES, Ours  # noqa: E402
from ..common.shapes import WORK  # noqa: E402
from ..common.tensors import MODES, make_tensors  # noqa: E402


def launch_verify(seed: int) -> None:
    for case in make_cases(seed, True, [torch.device("cuda")]):
        launch_case(case, Engine(ROW, torch.device("cpu")))


def launch_measurements() -> None:
    shapes = WORK["xlmr_large"].small()
    for mode in MODES:
        tensors = make_tensors(shapes, mode)
        for case in CASES:
            case.enter_last_epoch(make_optimizer(case, tensors, ROW.name))
            make_optimizer(case, tensors, ROW.name).step()
    for table in TABLES.values():
        tensors = make_tensors(shapes, table.mode)
        for row in table.rows:
            if isinstance(row, Ours):
                row.optimizer(tensors, ROW.name).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="of verify")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, as in 90 for 9.0")
    options = parser.parse_args()
    driver.set_active(CompilingDriver(GPUTarget("cuda", options.architecture, 32)))
    backends.BACKENDS = tuple(row for row in backends.BACKENDS if row.name != "cpu")  # which would make the masks
    kernels, began = Kernels(), time.monotonic()
    with kernels.wanted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch_verify(options.seed)
        launch_measurements()
    print(f"{len(kernels)} kernels, found in {time.monotonic() - began:.0f} s", flush=True)
    for done in kernels.compile(os.cpu_count() or 1):
        if done % 20 == 0 or done == len(kernels):
            print(f"{done} of {len(kernels)} compiled, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
