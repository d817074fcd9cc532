"""Masks the gradients of a batch in place, and does nothing else: for other optimizers."""

import triton
import triton.language as tl

from ..batch import TensorBatch
from .arithmetic import to_float32, to_storage
from .gradient import KEEP, load_gradient, masked_gradient
from .launch import WARPS, block_of, constants, on_device, prologue, tables_of
from .row import STEP_WORDS, TENSOR_WORDS, load_row


@triton.jit
def mask_block(
    row, block_start,
    G: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Masks the elements [block_start, block_start + BLOCK). FULL: all of them are in the tensor."""
    lane = tl.arange(0, BLOCK)
    in_bounds = None if FULL else lane < (row.numel - block_start).to(tl.int32)
    at = row.grad + block_start + lane
    if KIND_ == KEEP:  # a dropped block, also a frozen one, of which the prologue computes nothing
        g = tl.zeros([BLOCK], tl.float32)
    else:
        g = to_float32(load_gradient(at, in_bounds, True, False, FULL), INTERPRETED)
        g, keep, bucket = masked_gradient(
            row, g, 1.0, True, block_start, KIND_, PLANES, VEC, ROWS, False, False, False, INTERPRETED, BLOCK
        )
    tl.store(at, to_storage(g, G, INTERPRETED), mask=in_bounds)


@triton.jit
def mask_gradients_kernel(
    rows, step_rows, chunks,
    G: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Masks one chunk of one tensor's gradients."""
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk >> 40
    row = load_row(rows + tensor * TENSOR_WORDS, step_rows + tensor * STEP_WORDS, G, G, G, VEC)
    start = (chunk & 0xFFFFFFFFFF) * (BLOCK * BLOCKS)
    end = tl.minimum(start + BLOCK * BLOCKS, row.numel)
    while start + BLOCK <= end:
        start = tl.multiple_of(start, BLOCK)
        mask_block(row, start, G, KIND_, PLANES, VEC, ROWS, INTERPRETED, BLOCK, True)
        start += BLOCK
    if start < end:
        start = tl.multiple_of(start, BLOCK)
        mask_block(row, start, G, KIND_, PLANES, VEC, ROWS, INTERPRETED, BLOCK, False)


def mask_gradients_(batch: TensorBatch) -> None:
    """Masks the gradients of the batch in place. After the prologue there is one launch per mask kind and alignment."""
    tables, block = tables_of(batch), block_of(batch.device)
    launches = tables.launches_of_masks(batch.hypers)
    grad_dtype = batch.grad_dtype or batch.param_dtype
    with on_device(batch.device):
        if launches:
            prologue(tables, None, ages=False, advance=False)
        for launch in launches:
            compiled = constants(launch, grad_dtype, grad_dtype)
            names = ("G", "KIND_", "PLANES", "VEC", "ROWS", "INTERPRETED")
            mask_gradients_kernel[(launch.chunks.numel(),)](
                tables.rows, tables.step_rows, launch.chunks, **{name: compiled[name] for name in names},
                BLOCK=block, BLOCKS=tables.chunk // block, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
