"""The Triton kernels of a step: one program a tensor for the scalars, one program a chunk of elements for the update.

They read the tables of csrc/tensor_table.h (backends/device_tables.py puts them on the device) and compute what
csrc/adamw.h, philox.h, mask.h and gaussian.h compute, bit for bit in the exact mode. Every fused multiply-add is
written out. Nothing that changes from step to step is a constant of the compilation.

Formulation, measured on the compiled code (tests/backends/test_triton_contract.py):
  - a program loops over a chunk in whole blocks of BLOCK elements, with what it knows of the tensor in registers
    (triton_row.py), and then takes a last partial block; in one loop they cost up to 40 registers more.
  - each thread holds 8 elements of a block, as one 16-byte access a 16-bit tensor and two a float32 one. Beside
    float32 tensors a vector is VEC = 4 elements, else 8.
  - one Philox call gives the draws of 8 elements (triton_random.py).
  - a tensor that is not so aligned has VEC = 1: narrow accesses and a Philox call for every element.
"""

import triton
import triton.language as tl

from .triton_arithmetic import new_moments, new_parameter, stochastic_bfloat16, store, to_float32, to_storage
from .triton_gradient import BERNOULLI, BUCKET, FIXED, GAUSSIAN, KEEP, OFF, load_gradient, masked_gradient
from .triton_random import DOMAIN_ROUNDING, words32
from .triton_row import (
    BC2_SQRT,
    BC2_SQRT_RECIPROCAL,
    DECAY_FLAG,
    DEVIATION,
    FACTOR,
    FROZEN_FLAG,
    HYPER,
    LR_WEIGHT_DECAY,
    OFF_FLAG,
    S_BETA1,
    S_BETA2,
    S_BUCKETS,
    S_DRAW,
    S_EPS,
    S_FIRST,
    S_FLAGS,
    S_LAST,
    S_NUM_AGES,
    S_THRESHOLD,
    SKIP_FLAG,
    STEP,
    STEP_SIZE,
    STEP_WORDS,
    STEPS_SHIFT,
    TENSOR_WORDS,
    load_row,
)

# Columns of a HyperRow, in 8-byte words, then those of its 4-byte part.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SCALE, AGE_RATE, GLOBAL_STEP, AGES, NUM_AGES, DRAW = (
    tl.constexpr(i) for i in range(11)
)
KIND, FROZEN, THRESHOLD, BUCKETS, FIRST_BUCKET, LAST_BUCKET = (tl.constexpr(i) for i in range(22, 28))
MAXIMIZE, LR_AT = tl.constexpr(30), tl.constexpr(31)
HYPER_WORDS = tl.constexpr(16)


# --- the update -------------------------------------------------------------------------------------------------------


@triton.jit
def update_block(
    row, by_age, divisor, clip, block_start,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, AGES_: tl.constexpr, COPY_: tl.constexpr,
    STOCHASTIC: tl.constexpr, GRAD_SCALE: tl.constexpr, CLIP: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Masks, scales and updates the elements [block_start, block_start + BLOCK) of a tensor; FULL: all are in it."""
    lane = tl.arange(0, BLOCK)
    in_bounds = None if FULL else lane < (row.numel - block_start).to(tl.int32)
    other = None if FULL else 0.0
    # a lane each: the interpreter of 3.9 makes integers of a bool that is spread over lanes
    flags = row.flags + tl.zeros([BLOCK], tl.uint32)
    # The start of the block is added once a tensor, not once a thread.
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
        copy_old = tl.load(copy_at, mask=in_bounds, other=other) if FROZEN_ else 0

    g = to_float32(g_old, INTERPRETED)
    if GRAD_SCALE:
        g = tl.div_rn(g, divisor + tl.zeros_like(g))
        tl.store(g_at, to_storage(g, G, INTERPRETED), mask=in_bounds)
    g, keep, bucket = masked_gradient(
        row, g, clip, wanted, block_start, KIND_, PLANES, VEC, ROWS, GRAD_SCALE or CLIP, CLIP, INTERPRETED, BLOCK
    )
    moves = True
    if FROZEN_:
        moves = keep | ((flags & FROZEN_FLAG) == 0)

    m, v, vmax = new_moments(
        g, to_float32(m_old, INTERPRETED), to_float32(v_old, INTERPRETED), to_float32(vmax_old, INTERPRETED),
        row.beta1, row.beta2, AMSGRAD, INTERPRETED,
    )  # fmt: skip
    # Stored before the parameter is computed: held until after its division they would cost 10 to 50 registers.
    store(m_at, m, m_old, moves, in_bounds, M, FROZEN_, INTERPRETED)
    store(v_at, v, v_old, moves, in_bounds, M, FROZEN_, INTERPRETED)
    if AMSGRAD:
        store(vmax_at, vmax, vmax_old, moves, in_bounds, M, FROZEN_, INTERPRETED)

    step_size, bc2_sqrt, bc2_sqrt_reciprocal = row.step_size, row.bc2_sqrt, row.bc2_sqrt_reciprocal
    if AGES_:  # every bucket has its own bias corrections
        at = by_age + 4 * tl.minimum(bucket, row.num_ages - 1)
        step_size, bc2_sqrt, bc2_sqrt_reciprocal = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    p = new_parameter(
        to_float32(p_old, INTERPRETED), m, vmax if AMSGRAD else v, row.lr_weight_decay, row.eps,
        step_size, bc2_sqrt, bc2_sqrt_reciprocal, (flags & DECAY_FLAG) != 0, EXACT, INTERPRETED,
    )  # fmt: skip
    if STOCHASTIC:
        start = block_start + tl.arange(0, BLOCK // VEC) * VEC
        p = stochastic_bfloat16(p, words32(start, row, row.flags >> STEPS_SHIFT, DOMAIN_ROUNDING, VEC, ROWS))
    store(p_at, p, p_old, moves, in_bounds, P, FROZEN_, INTERPRETED)
    if COPY_:
        store(copy_at, p, copy_old, moves, in_bounds, G, FROZEN_, INTERPRETED)


@triton.jit(do_not_specialize=["age_stride"])
def masked_adamw_kernel(
    rows, step_rows, by_age_table, chunks, grad_scale, clip_factor, age_stride,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, AGES_: tl.constexpr, COPY_: tl.constexpr,
    STOCHASTIC: tl.constexpr, GRAD_SCALE: tl.constexpr, CLIP: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One masked AdamW step on one chunk: BLOCKS blocks of BLOCK elements of one tensor."""
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk >> 40
    row = load_row(rows + tensor * TENSOR_WORDS, step_rows + tensor * STEP_WORDS, P, G, M, VEC)
    by_age = by_age_table + tensor * age_stride * 4
    if (row.flags & SKIP_FLAG) == 0:
        divisor = tl.load(grad_scale) if GRAD_SCALE else 1.0
        clip = tl.load(clip_factor) if CLIP else 1.0
        first = (chunk & 0xFFFFFFFFFF) * (BLOCK * BLOCKS)
        end = tl.minimum(first + BLOCK * BLOCKS, row.numel)
        start = first
        while start + BLOCK <= end:
            start = tl.multiple_of(start, BLOCK)
            update_block(row, by_age, divisor, clip, start, P, G, M, KIND_, PLANES, VEC, ROWS, AMSGRAD, FROZEN_, AGES_,
                         COPY_, STOCHASTIC, GRAD_SCALE, CLIP, EXACT, INTERPRETED, BLOCK, True)  # fmt: skip
            start += BLOCK
        if start < end:
            start = tl.multiple_of(start, BLOCK)
            update_block(row, by_age, divisor, clip, start, P, G, M, KIND_, PLANES, VEC, ROWS, AMSGRAD, FROZEN_, AGES_,
                         COPY_, STOCHASTIC, GRAD_SCALE, CLIP, EXACT, INTERPRETED, BLOCK, False)  # fmt: skip


# --- the scalars of a step --------------------------------------------------------------------------------------------


@triton.jit
def bias_corrections(lr, beta1, beta2, age):
    """(step_size, sqrt(bias correction 2), its reciprocal) in float32; float64 inside, each rounded once.

    beta^age = exp(age ln beta): within 1e-13 of pow(), which only one float32 rounding in a million can tell.
    """
    bias_correction1 = (1.0 - tl.exp(age * tl.log(beta1))).to(tl.float32)
    bc2_sqrt = tl.sqrt(1.0 - tl.exp(age * tl.log(beta2))).to(tl.float32)
    one = tl.full(bc2_sqrt.shape, 1.0, tl.float32)
    return tl.div_rn(lr + tl.zeros_like(bc2_sqrt), bias_correction1), bc2_sqrt, tl.div_rn(one, bc2_sqrt)


@triton.jit(do_not_specialize=["age_stride"])
def prologue_kernel(
    rows, hypers, step_rows, by_age_table, found_inf, age_stride,
    FOUND_INF: tl.constexpr, AGES_: tl.constexpr, ADVANCE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the StepRow of one tensor, and its bias corrections by age where it has ages; with ADVANCE its step is
    counted.

    One program a tensor. Nothing of this comes back to the host.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row = rows + tensor * TENSOR_WORDS
    hyper = hypers + tl.load(row + HYPER) * HYPER_WORDS
    doubles, ints = hyper.to(tl.pointer_type(tl.float64)), hyper.to(tl.pointer_type(tl.int32))
    scalars = step_rows + tensor * STEP_WORDS
    as_float = scalars.to(tl.pointer_type(tl.float32))
    kind, frozen = tl.load(ints + KIND), tl.load(ints + FROZEN) != 0
    skip = (kind == OFF) & frozen
    if FOUND_INF:
        skip = skip | (tl.load(found_inf) != 0)
    if skip:
        tl.store(scalars + S_FLAGS, SKIP_FLAG)
    else:
        step_at = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        completed = tl.load(step_at)
        if ADVANCE:
            tl.store(step_at, completed + 1.0)

        lr, weight_decay = tl.load(doubles + LR).to(tl.float32), tl.load(doubles + WEIGHT_DECAY).to(tl.float32)
        lr_at = tl.load(ints + LR_AT)
        if lr_at == 1:  # in a tensor on the device
            lr = tl.load(tl.load(hyper + LR).to(tl.pointer_type(tl.float32)))
        elif lr_at == 2:
            lr = tl.load(tl.load(hyper + LR).to(tl.pointer_type(tl.float64))).to(tl.float32)
        beta1, beta2 = tl.load(doubles + BETA1).to(tl.float32), tl.load(doubles + BETA2).to(tl.float32)
        global_step, draw = tl.load(hyper + GLOBAL_STEP), tl.load(hyper + DRAW)
        scale = tl.load(doubles + SCALE).to(tl.float32)
        age = 1.0 + completed.to(tl.float64) * tl.load(doubles + AGE_RATE)
        age = tl.where(global_step != 0, global_step.to(tl.float64), age)
        step_size, bc2_sqrt, bc2_sqrt_reciprocal = bias_corrections(
            lr, beta1.to(tl.float64), beta2.to(tl.float64), age + tl.zeros([LANES], tl.float64)
        )
        lane = tl.arange(0, LANES)
        first_lane = lane == 0
        tl.store(as_float + STEP_SIZE + lane, step_size, mask=first_lane)
        tl.store(as_float + BC2_SQRT + lane, bc2_sqrt, mask=first_lane)
        tl.store(as_float + BC2_SQRT_RECIPROCAL + lane, bc2_sqrt_reciprocal, mask=first_lane)
        tl.store(as_float + LR_WEIGHT_DECAY, lr * weight_decay)
        tl.store(as_float + S_BETA1, beta1)
        tl.store(as_float + S_BETA2, beta2)
        tl.store(as_float + S_EPS, tl.load(doubles + EPS).to(tl.float32))
        # a dropped block's gradient is +0, never -0
        sign = tl.where((tl.load(ints + MAXIMIZE) != 0) & (kind != OFF), -1.0, 1.0)
        scales = (kind == BERNOULLI) | (kind == FIXED)
        tl.store(as_float + FACTOR, tl.where(scales, sign * scale, sign))
        tl.store(as_float + DEVIATION, tl.where(kind == GAUSSIAN, scale, 0.0))
        # Rows that keep everything may be in a launch of any drawn kind.
        keeps = kind == KEEP
        tl.store(scalars + S_THRESHOLD, tl.where(keeps, 0, tl.load(ints + THRESHOLD)).to(tl.uint32))
        draw = tl.where(draw < 0, completed.to(tl.int64), draw)
        tl.store(scalars + S_DRAW, tl.where(kind == BUCKET, 0, draw).to(tl.uint32))
        buckets = tl.load(ints + BUCKETS)
        tl.store(scalars + S_BUCKETS, tl.where(keeps, 1, buckets).to(tl.uint32))
        tl.store(scalars + S_FIRST, tl.where(keeps, 0, tl.load(ints + FIRST_BUCKET)).to(tl.uint32))
        tl.store(scalars + S_LAST, tl.where(keeps, 0, tl.load(ints + LAST_BUCKET)).to(tl.uint32))
        decays = tl.load(doubles + WEIGHT_DECAY) != 0
        flags = tl.where(kind == OFF, OFF_FLAG, 0) | tl.where(frozen, FROZEN_FLAG, 0) | tl.where(decays, DECAY_FLAG, 0)
        tl.store(scalars + S_FLAGS, (flags | completed.to(tl.int64) << STEPS_SHIFT).to(tl.uint32))

        if AGES_:
            by_age = by_age_table + tensor * age_stride * 4
            num_ages = tl.load(hyper + NUM_AGES)
            tl.store(scalars + S_NUM_AGES, tl.maximum(num_ages, 1).to(tl.uint32))
            ageless = lane == tl.where(num_ages == 0, 0, -1)  # one bucket for all, with the scalars above
            tl.store(by_age + lane, step_size, mask=ageless)
            tl.store(by_age + 1 + lane, bc2_sqrt, mask=ageless)
            tl.store(by_age + 2 + lane, bc2_sqrt_reciprocal, mask=ageless)
            ages = tl.load(hyper + AGES).to(tl.pointer_type(tl.int64))
            begin = 0
            while begin < num_ages:  # a range() of a tensor fails in the interpreter of 3.6 with numpy 2.4
                bucket = begin + lane
                own = tl.load(ages + bucket, mask=bucket < num_ages, other=1)
                own = tl.minimum(tl.maximum(own, 1), completed.to(tl.int64) + 1).to(tl.float64)
                step_size, bc2_sqrt, bc2_sqrt_reciprocal = bias_corrections(
                    lr, beta1.to(tl.float64), beta2.to(tl.float64), own
                )
                at = by_age + 4 * bucket
                tl.store(at, step_size, mask=bucket < num_ages)
                tl.store(at + 1, bc2_sqrt, mask=bucket < num_ages)
                tl.store(at + 2, bc2_sqrt_reciprocal, mask=bucket < num_ages)
                begin += LANES
