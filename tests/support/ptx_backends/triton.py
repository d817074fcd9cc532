"""The triton backend, compiled for a GPU that is not here. Triton's own driver is replaced while it launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from ptx.build import CACHE
from ptx.kernel import Kernel
from ptx.parse import Module
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from graddrop_kernels.backends import triton

from .emulation import Emulation

WARP = 32


class TritonEmulation(Emulation):
    """``arch``: 80, 90 or 100."""

    def __init__(self, arch: int, seed: int, change: Callable[[str], str] = str):
        super().__init__(f"triton on sm_{arch}", triton, seed, change)
        self._driver = _Driver(arch, self)

    @contextmanager
    def launched(self) -> Iterator[None]:
        before = driver._active
        with knobs.cache.scope(), knobs.compilation.scope(), knobs.runtime.scope():
            knobs.cache.dir = str(CACHE / "triton")
            knobs.compilation.store_binary_only = knobs.compilation.disable_line_info = True
            knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
            driver.set_active(self._driver)
            try:
                yield
            finally:
                driver._active = before


def _stop_at_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook: asked for its name, or to change the stages of a compilation. The machine code is the PTX."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return "stop at PTX", "stop at PTX"


@cache
def _kernel(ptx: str, name: str, in_step: bool) -> Kernel:
    return Kernel(Module(ptx), name, in_step)


class _Driver:
    """What Triton asks of a GPU. Every architecture is a device of its own, for which kernels are compiled."""

    def __init__(self, arch: int, emulation: TritonEmulation):
        self._target, self.emulation = GPUTarget("cuda", arch, WARP), emulation
        self.utils, self.launcher_cls = self, self._launcher

    def load_binary(self, name: str, binary: bytes, *arguments: object) -> tuple:
        return None, binary.decode(), 64, 0, 1024  # module, function, registers, spills, most threads

    def _launcher(self, source, metadata) -> Callable:
        threads = WARP * metadata.num_warps
        taken = [type_ != "constexpr" for type_ in source.signature.values()]

        def launch(blocks, y, z, stream, ptx, *rest):
            assert y == z == 1
            emulation = driver.active.emulation  # another one than has compiled it, perhaps
            # A program of one warp has no barriers: it relies on loads of all lanes being done before a store.
            kernel = _kernel(emulation.change(ptx), metadata.name, threads == WARP)
            given = [value for value, is_taken in zip(rest[-len(taken) :], taken) if is_taken]
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
            spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.numel()]
            emulation.launch(kernel, blocks, threads, values, spans, metadata.shared)

        return launch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 101_376, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name
