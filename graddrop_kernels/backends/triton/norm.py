"""The sum of the squares of a batch's gradients in float64, before or after their masks. A norm is its square root.

Each program writes the sum of its chunk to that chunk's slot. The last to finish adds the slots in order, so the result
does not depend on scheduling: the same gradients give the same bits.
"""

import torch
import triton
import triton.language as tl

from ..batch import TensorBatch
from ..launches import Launch
from .arithmetic import to_float32
from .gradient import KEEP, load_gradient, masked_gradient
from .launch import WARPS, block_of, constants, on_device, prologue, tables_of
from .row import OFF_FLAG, STEP_WORDS, TENSOR_WORDS, load_row

SUMMED = tl.constexpr(1024)  # sums of chunks that the last program adds up at a time


@triton.jit
def add_squares(
    squares, row, block_start,
    KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Returns ``squares`` (float64, one sum per lane) plus the squares of the elements [block_start, block_start +
    BLOCK). FULL: all of them are in the tensor.
    """
    lane = tl.arange(0, BLOCK)
    in_bounds = None if FULL else lane < (row.numel - block_start).to(tl.int32)
    wanted = ((row.flags + tl.zeros([BLOCK], tl.uint32)) & OFF_FLAG) == 0  # one per lane, see update_block
    g = load_gradient(row.grad + block_start + lane, in_bounds, wanted, MASKED and KIND_ == KEEP, FULL)
    g = to_float32(g, INTERPRETED)
    if MASKED:
        g, keep, bucket = masked_gradient(
            row, g, 1.0, wanted, block_start, KIND_, PLANES, VEC, ROWS, False, False, False, INTERPRETED, BLOCK
        )
    g = g.to(tl.float64)
    return tl.fma(g, g, squares)  # the product is exact in any case


@triton.jit(do_not_specialize=["first", "total"])
def sum_of_squares_kernel(
    rows, step_rows, chunks, sums, arrived, out, first, total,
    G: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds up the squares of one chunk. The last program of all launches together writes ``out`` and sets ``arrived``
    to 0.

    first: index of this launch's first chunk among the ``total`` chunks of all launches.
    """
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk >> 40
    row = load_row(rows + tensor * TENSOR_WORDS, step_rows + tensor * STEP_WORDS, G, G, G, VEC)
    start = (chunk & 0xFFFFFFFFFF) * (BLOCK * BLOCKS)
    end = tl.minimum(start + BLOCK * BLOCKS, row.numel)
    squares = tl.zeros([BLOCK], tl.float64)
    while start + BLOCK <= end:
        start = tl.multiple_of(start, BLOCK)
        squares = add_squares(squares, row, start, KIND_, PLANES, VEC, ROWS, MASKED, INTERPRETED, BLOCK, True)
        start += BLOCK
    if start < end:
        start = tl.multiple_of(start, BLOCK)
        squares = add_squares(squares, row, start, KIND_, PLANES, VEC, ROWS, MASKED, INTERPRETED, BLOCK, False)
    # One thread stores the sum and then counts the program as arrived, which is a release. The program that finds all
    # of them arrived acquires as a whole, and so sees every sum. Its loads bypass L1, which may hold older values.
    tl.store(sums + first + tl.program_id(0), tl.sum(squares, axis=0))
    if tl.atomic_add(arrived, 1, sem="acq_rel") == total - 1:
        tl.debug_barrier()
        place = tl.arange(0, SUMMED)
        added = tl.zeros([SUMMED], tl.float64)
        begin = 0
        while begin < total:
            added += tl.load(sums + begin + place, mask=begin + place < total, other=0.0, cache_modifier=".cg")
            begin += SUMMED
        tl.store(out, tl.sum(added, axis=0))
        tl.store(arrived, 0)


def sum_of_squares(batch: TensorBatch, masked: bool) -> torch.Tensor:
    """The sum of the squares of all gradients of the batch: float64 of shape (), on its device. The host does not wait.

    Neither ``grad_scale`` nor ``clip_factor`` is applied. ``masked``: the gradients are masked as in the next step, so
    dropped ones count as 0 and kept ones are multiplied by their scale. The step counts do not change.
    """
    tables = tables_of(batch, for_norm=True)
    launches = tables.launches_of_norm(masked)
    total, first = sum(launch.chunks.numel() for launch in launches), 0
    out = (torch.empty if total else torch.zeros)((), dtype=torch.float64, device=batch.device)
    block = block_of(batch.device)
    with on_device(batch.device), tables.places(total) as (sums, arrived):
        if masked:
            prologue(tables, None, ages=False, advance=False)
        for launch in launches:
            programs = launch.chunks.numel()
            sum_of_squares_kernel[(programs,)](
                tables.rows, tables.step_rows, launch.chunks, sums, arrived, out, first, total,
                **norm_constants(launch, batch.grad_dtype or batch.param_dtype, masked),
                BLOCK=block, BLOCKS=tables.chunk // block, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            first += programs
    return out


def norm_constants(launch: Launch, grad_dtype: torch.dtype, masked: bool) -> dict:
    """The compile-time constants of a launch's norm kernel."""
    update = constants(launch, grad_dtype, grad_dtype)
    names = ("G", "KIND_", "PLANES", "VEC", "ROWS", "INTERPRETED")
    return {name: update[name] for name in names} | {"MASKED": masked, "ROWS": masked and launch.rows}
