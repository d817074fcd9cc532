"""Compiles kernels before they are needed, in several processes at a time, into Triton's cache on the disk."""

import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_PATIENCE = 60.0  # seconds without one more kernel, after which the rest is left to be compiled when it is needed


class CompilingDriver:
    """Stands for the GPU's driver where kernels are compiled and none is launched."""

    def __init__(self, target: GPUTarget, device: int = 0):
        self._target, self._device = target, device

    def get_current_target(self) -> GPUTarget:
        """Returns the GPU that is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Returns the number of the device, by which Triton finds what it has compiled."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """Returns the stream that nothing is launched on."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Returns the device of the tensors."""
        return torch.device("cpu")

    def is_active(self) -> bool:
        """Returns True: Triton asks for no other driver."""
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        """Returns the type as it is, as no launcher is made."""
        return name


class Kernels:
    """The kernels that ``wanted`` has met and that were not compiled yet, each one once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Any, str]] = {}

    def __len__(self) -> int:
        return len(self._found)

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Lists what would be compiled in the context. It is neither compiled nor launched."""
        before = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = self._meet
        try:
            yield
        finally:
            triton.knobs.runtime.jit_cache_hook = before

    def _meet(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data: str = compile["specialization_data"]
        self._found.setdefault(data, (fn.jit_function, data))
        return True  # Triton then returns without compiling

    def compile(self, processes: int, patience: float = _PATIENCE) -> Iterator[int]:
        """Compiles them, and yields their number so far. What fails is left to fail where it is launched."""
        stand_in = CompilingDriver(driver.active.get_current_target(), driver.active.get_current_device())
        found = list(self._found.values())
        # A forked process needs no seconds for imports. It must not touch the GPU: the stand-in sees to that.
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's of a fork beside threads
            pool = context.Pool(max(1, min(processes, len(found))), _begin, (stand_in, found))
        with pool:
            compiled = pool.imap_unordered(_compile, range(len(found)))
            for number in range(1, len(found) + 1):
                try:
                    compiled.next(patience)
                except multiprocessing.TimeoutError:
                    return
                yield number


_inherited: list[tuple[Any, str]] = []  # by a forked process


def _begin(stand_in: CompilingDriver, kernels: list[tuple[Any, str]]) -> None:
    driver.set_active(stand_in)
    _inherited[:] = kernels


def _compile(number: int) -> None:
    function, data = _inherited[number]
    try:
        function.preload(data)
    except Exception:  # the launch will tell
        return
