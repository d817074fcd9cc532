"""The prologue kernel: one program per tensor computes the scalars of its row, once per step."""

import triton
import triton.language as tl

from .gradient import BERNOULLI, BUCKET, FIXED, GAUSSIAN, KEEP, OFF
from .row import (
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
)

# Columns of a HyperRow, in 8-byte words, then those of its 4-byte part.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SCALE, AGE_RATE, GLOBAL_STEP, AGES, NUM_AGES, DRAW = (
    tl.constexpr(i) for i in range(11)
)
MASK_FROZEN, MASK_UPDATE = tl.constexpr(1), tl.constexpr(2)  # Masked
KIND, MASKED, THRESHOLD, BUCKETS, FIRST_BUCKET, LAST_BUCKET = (tl.constexpr(i) for i in range(22, 28))
MAXIMIZE, LR_AT, WEIGHT_DECAY_AT = (tl.constexpr(i) for i in range(30, 33))
HYPER_WORDS = tl.constexpr(17)


@triton.jit
def number(hyper, COLUMN: tl.constexpr, AT: tl.constexpr):
    """A number of a HyperRow, or that of a tensor on the device, in float64."""
    value = tl.load(hyper.to(tl.pointer_type(tl.float64)) + COLUMN)
    at = tl.load(hyper.to(tl.pointer_type(tl.int32)) + AT)
    if at == 1:
        value = tl.load(tl.load(hyper + COLUMN).to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif at == 2:
        value = tl.load(tl.load(hyper + COLUMN).to(tl.pointer_type(tl.float64)))
    return value


@triton.jit
def bias_corrections(lr, beta1, beta2, age):
    """(step_size, sqrt(bias correction 2), its reciprocal) in float32, computed in float64 and rounded once each.

    beta^age is exp(age ln beta), within 1e-13 of pow(). Only one float32 rounding in a million can differ by that.
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
    """Writes the StepRow of one tensor, and its bias corrections by age if it has ages. With ADVANCE it also counts the
    tensor's step.

    There is one program per tensor. Nothing of this comes back to the host.
    """
    tensor = tl.program_id(0).to(tl.int64)
    row = rows + tensor * TENSOR_WORDS
    hyper = hypers + tl.load(row + HYPER) * HYPER_WORDS
    doubles, ints = hyper.to(tl.pointer_type(tl.float64)), hyper.to(tl.pointer_type(tl.int32))
    scalars = step_rows + tensor * STEP_WORDS
    as_float = scalars.to(tl.pointer_type(tl.float32))
    kind, masked = tl.load(ints + KIND), tl.load(ints + MASKED)
    frozen, update = masked == MASK_FROZEN, masked == MASK_UPDATE
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

        lr, weight_decay = number(hyper, LR, LR_AT).to(tl.float32), number(hyper, WEIGHT_DECAY, WEIGHT_DECAY_AT)
        beta1, beta2 = tl.load(doubles + BETA1).to(tl.float32), tl.load(doubles + BETA2).to(tl.float32)
        global_step, draw = tl.load(hyper + GLOBAL_STEP), tl.load(hyper + DRAW)
        scale = tl.load(doubles + SCALE).to(tl.float32)
        age = 1.0 + completed.to(tl.float64) * tl.load(doubles + AGE_RATE)
        age = tl.where(global_step != 0, global_step.to(tl.float64), age)
        step_size, bc2_sqrt, bc2_sqrt_reciprocal = bias_corrections(
            lr, beta1.to(tl.float64), beta2.to(tl.float64), age + tl.zeros([LANES], tl.float64)
        )
        scale_of_update = tl.where(update, scale, 1.0)
        step_size *= scale_of_update
        lane = tl.arange(0, LANES)
        first_lane = lane == 0
        tl.store(as_float + STEP_SIZE + lane, step_size, mask=first_lane)
        tl.store(as_float + BC2_SQRT + lane, bc2_sqrt, mask=first_lane)
        tl.store(as_float + BC2_SQRT_RECIPROCAL + lane, bc2_sqrt_reciprocal, mask=first_lane)
        tl.store(as_float + LR_WEIGHT_DECAY, lr * weight_decay.to(tl.float32))
        tl.store(as_float + S_BETA1, beta1)
        tl.store(as_float + S_BETA2, beta2)
        tl.store(as_float + S_EPS, tl.load(doubles + EPS).to(tl.float32))
        off = (kind == OFF) & (masked != MASK_UPDATE)  # a dropped block's gradient is +0, never -0
        sign = tl.where((tl.load(ints + MAXIMIZE) != 0) & (off == 0), -1.0, 1.0)
        scales = ((kind == BERNOULLI) | (kind == FIXED)) & (masked != MASK_UPDATE)
        tl.store(as_float + FACTOR, tl.where(scales, sign * scale, sign))
        tl.store(as_float + DEVIATION, tl.where(kind == GAUSSIAN, scale, 0.0))
        # Rows that keep everything may be in a launch of any drawn kind.
        keeps = kind == KEEP
        tl.store(scalars + S_THRESHOLD, tl.where(keeps, 0, tl.load(ints + THRESHOLD)).to(tl.uint32))
        draw = tl.where(draw < 0, completed.to(tl.int64), draw)
        tl.store(scalars + S_DRAW, tl.where(kind == BUCKET, 0, draw).to(tl.uint32))
        buckets = tl.load(ints + BUCKETS)
        tl.store(scalars + S_BUCKETS, tl.where(keeps, 1, buckets).to(tl.uint32))
        # A dropped row of masked="update" has one bucket, out of the range.
        first = tl.where(keeps, 0, tl.where((kind == OFF) & update, 1, tl.load(ints + FIRST_BUCKET)))
        tl.store(scalars + S_FIRST, first.to(tl.uint32))
        tl.store(scalars + S_LAST, tl.where(keeps, 0, tl.load(ints + LAST_BUCKET)).to(tl.uint32))
        flags = tl.where(off, OFF_FLAG, 0) | tl.where(frozen, FROZEN_FLAG, 0)
        flags = flags | tl.where(weight_decay != 0, DECAY_FLAG, 0)
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
