"""A driver of Triton that only compiles and counts, without a GPU."""

from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from graddrop_kernels.backends.triton import norm, prologue, update
from graddrop_kernels.backends.triton.ahead import CompilingDriver

SM_90 = GPUTarget("cuda", 90, 32)
_KERNELS = {
    "update": update.masked_adamw_kernel, "prologue": prologue.prologue_kernel, "norm": norm.sum_of_squares_kernel,
}  # fmt: skip


class CountingDriver(CompilingDriver):
    """Replaces the GPU's driver: kernels are compiled as for an H100, and launches only recorded."""

    def __init__(self):
        super().__init__(SM_90)
        self.launches: list[tuple[str, int]] = []  # (kernel, programs)
        self.utils = self
        self.launcher_cls = self._launcher

    def _launcher(self, source, metadata):
        return lambda programs, *arguments: self.launches.append((metadata.name, programs))

    def load_binary(self, name, *arguments):
        return None, None, 64, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


@contextmanager
def counting_driver():
    """Makes kernels take CPU tensors and do nothing inside the context."""
    before, counting = driver._active, CountingDriver()
    for function in _KERNELS.values():
        function.device_caches.clear()
    driver.set_active(counting)
    try:
        yield counting
    finally:
        driver._active = before
        for function in _KERNELS.values():
            function.device_caches.clear()


def compile_keys() -> dict[str, int]:
    """Counts how often each launched kernel has been compiled under the counting driver."""
    counts = {name: len(function.device_caches[0][0]) for name, function in _KERNELS.items()}
    return {name: count for name, count in counts.items() if count}
