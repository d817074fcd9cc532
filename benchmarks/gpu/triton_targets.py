"""Compiles variants of the Triton update kernel for any target, without a GPU."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graddrop_kernels.backends.device_tables import CHUNK
from graddrop_kernels.backends.launches import Launch
from graddrop_kernels.backends.triton import launch as backend
from graddrop_kernels.backends.triton import norm, prologue
from graddrop_kernels.backends.triton import update as kernels

from .sass import Kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SM_90 = GPUTarget("cuda", 90, 32)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_DTYPES = {"f": F32, "b": BF16, "h": F16}
# Dtypes of parameters, gradients, moments. Parameters of another dtype than their gradients are master weights.
_MODES = ("fff", "ffb", "bbf", "bbb", "hhf", "hhh", "fbf", "fhf")
MODES = {name: tuple(_DTYPES[letter] for letter in name) for name in _MODES}
ALIGNED = [["tt.divisibility", 16]]  # as in a real launch, for the tables' addresses


@dataclass(frozen=True)
class Variant:
    """One compilation of the update kernel. ``mode``: dtypes of parameter, gradient, moments: f(loat32), b(float16),
    h(alf).
    """

    mode: str
    kind: str
    planes: int = -1
    aligned: bool = True
    rows: bool = False
    amsgrad: bool = False
    frozen: bool = False
    ages: bool = False
    grad_scale: bool = False
    clip: bool = False
    stochastic: int = 0  # bits of TensorBatch.stochastic
    update: bool = False
    cautious: bool = False

    def __str__(self) -> str:
        flags = ("rows", "amsgrad", "frozen", "ages", "grad_scale", "clip", "update", "cautious")
        text = [name for name in flags if getattr(self, name)]
        text += [("", "stochastic", "stochastic moments", "stochastic both")[self.stochastic]] * bool(self.stochastic)
        planes = f" {self.planes} planes" if self.planes >= 0 else ""
        unaligned = [] if self.aligned else ["unaligned"]
        return " ".join([self.mode, self.kind + planes, *text, *unaligned])

    @property
    def vector(self) -> int:
        """Number of elements per access."""
        return 1 if not self.aligned else 4 if F32 in MODES[self.mode] else 8

    @property
    def copies(self) -> bool:
        """Whether there are master weights."""
        return self.mode[0] != self.mode[1]

    @property
    def launch(self) -> Launch:
        names = ("kind", "planes", "aligned", "rows", "amsgrad", "frozen", "ages", "update", "cautious")
        return Launch(**{name: getattr(self, name) for name in names})

    def but(self, **changes) -> "Variant":
        return replace(self, **changes)


def compile_update(variant: Variant, target: GPUTarget = SM_90, **changes):
    """Compiles as backends/triton/launch.py does, with ``changes`` to the constants. Returns the result of
    triton.compile.
    """
    param, grad, moments = MODES[variant.mode]
    constants = backend.constants(
        variant.launch, param, moments, grad, variant.copies, variant.stochastic, variant.grad_scale, variant.clip,
    )  # fmt: skip
    constants |= {**blocks(target), **changes}
    arguments = {"rows": "*i64", "step_rows": "*i32", "by_age_table": "*fp32", "chunks": "*i64", "age_stride": "i32"}
    for name, given in (("grad_scale", variant.grad_scale), ("clip_factor", variant.clip)):
        if given:
            arguments[name] = "*fp32"
        else:
            constants[name] = None
    options = {"num_warps": backend.WARPS, "enable_fp_fusion": False}
    return _compile(kernels.masked_adamw_kernel, arguments, constants, target, options)


def compile_norm(variant: Variant, masked: bool = True, target: GPUTarget = SM_90):
    """Compiles as backends/triton/norm.py does."""
    constants = norm.norm_constants(variant.launch, MODES[variant.mode][1], masked)
    constants |= blocks(target)
    arguments = {"rows": "*i64", "step_rows": "*i32", "chunks": "*i64", "sums": "*fp64", "arrived": "*i32",
                 "out": "*fp64", "first": "i32", "total": "i32"}  # fmt: skip
    options = {"num_warps": backend.WARPS, "enable_fp_fusion": False}
    return _compile(norm.sum_of_squares_kernel, arguments, constants, target, options)


def blocks(target: GPUTarget) -> dict[str, int]:
    block = backend.ELEMENTS * backend.WARPS * target.warp_size
    return {"BLOCK": block, "BLOCKS": CHUNK // block}


def compile_prologue(found_inf: bool, ages: bool, target: GPUTarget = SM_90, advance: bool = True):
    constants = {"FOUND_INF": found_inf, "AGES_": ages, "ADVANCE": advance, "LANES": 32}
    arguments = {"rows": "*i64", "hypers": "*i64", "step_rows": "*i32", "by_age_table": "*fp32", "age_stride": "i32"}
    if found_inf:
        arguments["found_inf"] = "*fp32"
    else:
        constants["found_inf"] = None
    return _compile(prologue.prologue_kernel, arguments, constants, target, {"num_warps": 1, "enable_fp_fusion": False})


def _compile(function, arguments: dict, constants: dict, target: GPUTarget, options: dict):
    names = function.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    tables = [name for name, type_ in arguments.items() if "*" in type_]
    aligned = {(names.index(name),): ALIGNED for name in tables}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=target, options=options)


def machine_code(compiled) -> Kernel:
    """Reads the machine code of an NVIDIA target."""
    with tempfile.TemporaryDirectory() as folder:
        return Kernel(compiled.asm["cubin"], compiled.metadata.name, TOOLS, Path(folder))
