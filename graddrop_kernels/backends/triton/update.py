"""The Triton kernels of a step: one program per tensor for the scalars, one program per chunk for the update.

They read the tables of csrc/tensor_table.h, which backends/device_tables.py puts on the device. They compute what
csrc/adamw.h, philox.h, mask.h and gaussian.h compute, bit for bit. Every fused multiply-add is written out. Nothing
that changes from step to step is a compile-time constant.

Formulation, measured on the compiled code (tests/backends/test_triton_contract.py):
  - a program loops over the whole blocks of BLOCK elements in its chunk, with the tensor's Row in registers (row.py).
    It takes a last partial block after the loop; in one loop they cost up to 40 registers more.
  - each thread holds 8 elements of a block: one 16-byte access per 16-bit tensor, two per float32 tensor. A vector has
    VEC = 4 elements if one of the tensors is float32, else 8.
  - one Philox call gives the draws of 8 elements (random.py).
  - a tensor that is not aligned for this has VEC = 1, with narrow accesses and a Philox call for every element.
"""

import triton
import triton.language as tl

from .. import batch as bits
from ..batch import TensorBatch
from .arithmetic import new_moments, new_parameter, stochastic_bfloat16, store, to_float32, to_storage
from .gradient import KEEP, load_gradient, masked_gradient
from .launch import WARPS, block_of, constants, on_device, prologue, tables_of
from .random import DOMAIN_MOMENTS, DOMAIN_ROUNDING, words32
from .row import (
    DECAY_FLAG,
    FROZEN_FLAG,
    OFF_FLAG,
    SKIP_FLAG,
    STEP_WORDS,
    STEPS_SHIFT,
    TENSOR_WORDS,
    load_row,
)

ROUND_PARAMS, ROUND_MOMENTS = tl.constexpr(bits.ROUND_PARAMS), tl.constexpr(bits.ROUND_MOMENTS)


@triton.jit
def update_block(
    row, by_age, divisor, clip, block_start,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, UPDATE: tl.constexpr, CAUTIOUS: tl.constexpr,
    AGES_: tl.constexpr, COPY_: tl.constexpr, STOCHASTIC: tl.constexpr, GRAD_SCALE: tl.constexpr, CLIP: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Masks, scales and updates the elements [block_start, block_start + BLOCK) of a tensor; FULL: all are in it."""
    lane = tl.arange(0, BLOCK)
    in_bounds = None if FULL else lane < (row.numel - block_start).to(tl.int32)
    other = None if FULL else 0.0
    # one per lane: the interpreter of 3.9 makes integers of a bool that is spread over lanes
    flags = row.flags + tl.zeros([BLOCK], tl.uint32)
    # The start of the block is added once per tensor, not once per thread.
    p_at, g_at = row.param + block_start + lane, row.grad + block_start + lane
    m_at, v_at = row.exp_avg + block_start + lane, row.exp_avg_sq + block_start + lane

    # All loads first, so that they are in flight while the random numbers are made.
    wanted = (flags & OFF_FLAG) == 0
    # rows of a dropped block: the gradient counts as 0 and is not read, unless it is written back
    g_old = load_gradient(g_at, in_bounds, wanted, KIND_ == KEEP and not GRAD_SCALE, FULL)
    m_old = tl.load(m_at, mask=in_bounds, other=other)
    v_old = tl.load(v_at, mask=in_bounds, other=other)
    p_old = tl.load(p_at, mask=in_bounds, other=other)
    vmax_old = v_old
    if AMSGRAD:
        vmax_at = row.max_exp_avg_sq + block_start + lane
        vmax_old = tl.load(vmax_at, mask=in_bounds, other=other)
    if COPY_:
        copy_at = row.copy + block_start + lane
        copy_old = tl.load(copy_at, mask=in_bounds, other=other) if FROZEN_ or UPDATE else 0

    g = to_float32(g_old, INTERPRETED)
    if GRAD_SCALE:
        g = tl.div_rn(g, divisor + tl.zeros_like(g))
        tl.store(g_at, to_storage(g, G, INTERPRETED), mask=in_bounds)
    g, keep, bucket = masked_gradient(
        row, g, clip, wanted, block_start, KIND_, PLANES, VEC, ROWS, GRAD_SCALE or CLIP, CLIP, UPDATE, INTERPRETED,
        BLOCK,
    )  # fmt: skip
    moves = True
    if FROZEN_:
        moves = keep | ((flags & FROZEN_FLAG) == 0)

    m, v, vmax = new_moments(
        g, to_float32(m_old, INTERPRETED), to_float32(v_old, INTERPRETED), to_float32(vmax_old, INTERPRETED),
        row.beta1, row.beta2, AMSGRAD, INTERPRETED,
    )  # fmt: skip
    m_stored, v_stored, vmax_stored = m, v, vmax
    if ROUND_MOMENTS & STOCHASTIC:  # in this order for the interpreter, where the second is an int
        start = block_start + tl.arange(0, BLOCK // VEC) * VEC
        words = words32(start, row, row.flags >> STEPS_SHIFT, DOMAIN_MOMENTS, VEC, ROWS)
        m_stored, v_stored = stochastic_bfloat16(m, words), stochastic_bfloat16(v, words << 16)
        vmax_stored = stochastic_bfloat16(vmax, words << 16)
    # Stored before the parameter is computed: held until after its division they would cost 10 to 50 registers.
    store(m_at, m_stored, m_old, moves, in_bounds, M, FROZEN_, INTERPRETED)
    store(v_at, v_stored, v_old, moves, in_bounds, M, FROZEN_, INTERPRETED)
    if AMSGRAD:
        store(vmax_at, vmax_stored, vmax_old, moves, in_bounds, M, FROZEN_, INTERPRETED)

    step_size, bc2_sqrt, bc2_sqrt_reciprocal = row.step_size, row.bc2_sqrt, row.bc2_sqrt_reciprocal
    if AGES_:  # every bucket has its own bias corrections
        at = by_age + 2 * tl.minimum(bucket, row.num_ages - 1)
        pair = tl.load(at)
        step_size = pair.to(tl.uint32).to(tl.float32, bitcast=True)
        bc2_sqrt = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        bc2_sqrt_reciprocal = tl.load(at + 1).to(tl.uint32).to(tl.float32, bitcast=True)
    p = new_parameter(
        to_float32(p_old, INTERPRETED), m, vmax if AMSGRAD else v, row.lr_weight_decay, row.eps,
        step_size, bc2_sqrt, bc2_sqrt_reciprocal, (flags & DECAY_FLAG) != 0, CAUTIOUS, INTERPRETED,
    )  # fmt: skip
    if ROUND_PARAMS & STOCHASTIC:
        start = block_start + tl.arange(0, BLOCK // VEC) * VEC
        p = stochastic_bfloat16(p, words32(start, row, row.flags >> STEPS_SHIFT, DOMAIN_ROUNDING, VEC, ROWS))
    if UPDATE:
        moves = keep
    store(p_at, p, p_old, moves, in_bounds, P, FROZEN_ or UPDATE, INTERPRETED)
    if COPY_:
        store(copy_at, p, copy_old, moves, in_bounds, G, FROZEN_ or UPDATE, INTERPRETED)


@triton.jit(do_not_specialize=["age_stride"])
def masked_adamw_kernel(
    rows, step_rows, by_age_table, chunks, grad_scale, clip_factor, age_stride,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, UPDATE: tl.constexpr, CAUTIOUS: tl.constexpr,
    AGES_: tl.constexpr, COPY_: tl.constexpr, STOCHASTIC: tl.constexpr, GRAD_SCALE: tl.constexpr, CLIP: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Makes one masked AdamW step on one chunk: BLOCKS blocks of BLOCK elements of one tensor."""
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk >> 40
    row = load_row(rows + tensor * TENSOR_WORDS, step_rows + tensor * STEP_WORDS, P, G, M, VEC)
    by_age = by_age_table.to(tl.pointer_type(tl.uint64)) + tensor * age_stride * 2  # two of its four float32 at once
    if (row.flags & SKIP_FLAG) == 0:
        divisor = tl.load(grad_scale) if GRAD_SCALE else 1.0
        clip = tl.load(clip_factor) if CLIP else 1.0
        first = (chunk & 0xFFFFFFFFFF) * (BLOCK * BLOCKS)
        end = tl.minimum(first + BLOCK * BLOCKS, row.numel)
        start = first
        while start + BLOCK <= end:
            start = tl.multiple_of(start, BLOCK)
            update_block(row, by_age, divisor, clip, start, P, G, M, KIND_, PLANES, VEC, ROWS, AMSGRAD, FROZEN_, UPDATE,
                         CAUTIOUS, AGES_, COPY_, STOCHASTIC, GRAD_SCALE, CLIP, INTERPRETED, BLOCK, True)  # fmt: skip
            start += BLOCK
        if start < end:
            start = tl.multiple_of(start, BLOCK)
            update_block(row, by_age, divisor, clip, start, P, G, M, KIND_, PLANES, VEC, ROWS, AMSGRAD, FROZEN_, UPDATE,
                         CAUTIOUS, AGES_, COPY_, STOCHASTIC, GRAD_SCALE, CLIP, INTERPRETED, BLOCK, False)  # fmt: skip


def masked_adamw_(batch: TensorBatch) -> None:
    """Makes one masked AdamW step on the batch, in place. One launch computes the scalars. Then there is one launch per
    mask kind and alignment.
    """
    tables, block = tables_of(batch), block_of(batch.device)
    compiled = {
        "param_dtype": batch.param_dtype, "moment_dtype": batch.moment_dtype, "grad_dtype": batch.grad_dtype,
        "copies": tables.has_copies, "stochastic": batch.stochastic, "grad_scale": batch.grad_scale is not None,
        "clip": batch.clip_factor is not None,
    }  # fmt: skip
    with on_device(batch.device):
        prologue(tables, batch.found_inf, ages=tables.age_stride > 0, advance=True)
        for launch in tables.launches:
            masked_adamw_kernel[(launch.chunks.numel(),)](
                tables.rows, tables.step_rows, tables.by_age, launch.chunks, batch.grad_scale, batch.clip_factor,
                tables.age_stride, **constants(launch, **compiled),
                BLOCK=block, BLOCKS=tables.chunk // block, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
