"""Compiles the Triton kernels that a run on a GPU launches, into TRITON_CACHE_DIR, on a machine without a GPU.

Needs the Python and the Triton of the GPU machine: both are part of what a compiled kernel is found by. The kernels are
those of the cases of `verify --quick` and of everything that is measured, launched on CPU tensors by no driver.
"""

import argparse
import os
import sys
import time
import warnings


def backend_on_cpu():
    """Returns the triton backend, taking CPU tensors. Call it before anything imports the package."""
    import triton  # noqa: F401 its own functions must be compiled ones

    os.environ["TRITON_INTERPRET"] = "1"  # which the backend asks when it is imported, and when it is first used
    from graddrop_kernels import backends

    row = next(backend for backend in backends.BACKENDS if backend.name == "triton")
    assert row.unavailable() is None and row.devices == ("cpu",)
    del os.environ["TRITON_INTERPRET"]
    backends.BACKENDS = tuple(each for each in backends.BACKENDS if each.name != "cpu")  # which would make the masks
    return row


def launch_verify(row, seed: int) -> None:
    import torch

    from graddrop_kernels.tools.verify.cases import make_cases
    from graddrop_kernels.tools.verify.run_case import Engine, launch_case

    for case in make_cases(seed, True, [torch.device("cuda")]):
        launch_case(case, Engine(row, torch.device("cpu")))


def launch_measurements(row) -> None:
    from ..common.cases import CASES, make_optimizer
    from ..common.modes import TABLES, Ours
    from ..common.shapes import WORK
    from ..common.tensors import MODES, make_tensors

    shapes = WORK["xlmr_large"].small()
    for mode in MODES:
        tensors = make_tensors(shapes, mode)
        for case in CASES:
            case.enter_last_epoch(make_optimizer(case, tensors, row.name))
    for table in TABLES.values():
        tensors = make_tensors(shapes, table.mode)
        for each in table.rows:
            if isinstance(each, Ours):
                each.optimizer(tensors, row.name).step()


def find_kernels(seed: int, architecture: int):
    """Returns the kernels of all launches, not compiled yet."""
    row = backend_on_cpu()
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from graddrop_kernels.backends.triton.ahead import CompilingDriver, Kernels

    driver.set_active(CompilingDriver(GPUTarget("cuda", architecture, 32)))
    kernels = Kernels()
    with kernels.wanted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch_verify(row, seed)
        launch_measurements(row)
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of verify")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, as in 90 for 9.0")
    options = parser.parse_args()
    began = time.monotonic()
    kernels = find_kernels(options.seed, options.architecture)
    print(f"{len(kernels)} kernels, found in {time.monotonic() - began:.0f} s", flush=True)
    for done in kernels.compile(os.cpu_count() or 1):
        if done % 20 == 0 or done == len(kernels):
            print(f"{done} of {len(kernels)} compiled, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
