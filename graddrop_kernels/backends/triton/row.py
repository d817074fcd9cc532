"""The columns of TensorRow and StepRow (csrc/tensor_table.h) in Triton, and Row, into which a program loads them."""

from typing import NamedTuple

import triton
import triton.language as tl

# Columns of a TensorRow, in 8-byte words.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, MASK_WORDS, NUMEL = (tl.constexpr(i) for i in range(8))
BASE, LOCAL_INNER, GLOBAL_INNER, KEY, HYPER, COPY = (tl.constexpr(i) for i in range(8, 14))
TENSOR_WORDS = tl.constexpr(14)
# Columns of a StepRow, in 4-byte words.
LR_WEIGHT_DECAY, S_BETA1, S_BETA2, S_EPS, STEP_SIZE, BC2_SQRT, BC2_SQRT_RECIPROCAL, FACTOR, DEVIATION = (
    tl.constexpr(i) for i in range(9)
)
S_THRESHOLD, S_DRAW, S_BUCKETS, S_FIRST, S_LAST, S_FLAGS, S_NUM_AGES = (tl.constexpr(i) for i in range(9, 16))
STEP_WORDS = tl.constexpr(16)
SKIP_FLAG, OFF_FLAG, FROZEN_FLAG, DECAY_FLAG = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
# The bits above the flags are the parameter's completed steps, for stochastic rounding. A mask's draw is not always
# that number, since it may be drawn once per epoch. A float32 counts to 2^24.
STEPS_SHIFT = tl.constexpr(4)


class Row(NamedTuple):
    """One tensor's addresses, layout, stream, scalars and mask rule, in registers."""

    param: tl.tensor
    grad: tl.tensor
    exp_avg: tl.tensor
    exp_avg_sq: tl.tensor
    max_exp_avg_sq: tl.tensor
    copy: tl.tensor
    mask_words: tl.tensor
    numel: tl.tensor
    base: tl.tensor
    local_inner: tl.tensor
    global_inner: tl.tensor
    k0: tl.tensor
    k1: tl.tensor
    lr_weight_decay: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    step_size: tl.tensor
    bc2_sqrt: tl.tensor
    bc2_sqrt_reciprocal: tl.tensor
    factor: tl.tensor
    deviation: tl.tensor
    threshold: tl.tensor
    draw: tl.tensor
    buckets: tl.tensor
    first_bucket: tl.tensor
    last_bucket: tl.tensor
    flags: tl.tensor
    num_ages: tl.tensor


@triton.jit
def typed(row, column, dtype: tl.constexpr, VEC: tl.constexpr):
    """A pointer from a TensorRow, with its known alignment."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, VEC * (dtype.primitive_bitwidth // 8))


@triton.jit
def load_row(row, scalars, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, VEC: tl.constexpr):
    """Loads a Row once, before any store. After a store the compiler would have to load it again. Fields that are not
    used are not loaded.
    """
    floats, unsigned = scalars.to(tl.pointer_type(tl.float32)), scalars.to(tl.pointer_type(tl.uint32))
    key = (row + KEY).to(tl.pointer_type(tl.uint32))  # in halves: with a whole key, Philox would be computed in 64 bits
    return Row(
        typed(row, PARAM, P, VEC), typed(row, GRAD, G, VEC), typed(row, EXP_AVG, M, VEC),
        typed(row, EXP_AVG_SQ, M, VEC), typed(row, MAX_EXP_AVG_SQ, M, VEC), typed(row, COPY, G, VEC),
        typed(row, MASK_WORDS, tl.uint8, 1),
        tl.load(row + NUMEL), tl.load(row + BASE), tl.load(row + LOCAL_INNER), tl.load(row + GLOBAL_INNER),
        tl.load(key), tl.load(key + 1),
        tl.load(floats + LR_WEIGHT_DECAY), tl.load(floats + S_BETA1), tl.load(floats + S_BETA2),
        tl.load(floats + S_EPS), tl.load(floats + STEP_SIZE), tl.load(floats + BC2_SQRT),
        tl.load(floats + BC2_SQRT_RECIPROCAL), tl.load(floats + FACTOR), tl.load(floats + DEVIATION),
        tl.load(unsigned + S_THRESHOLD), tl.load(unsigned + S_DRAW), tl.load(unsigned + S_BUCKETS),
        tl.load(unsigned + S_FIRST), tl.load(unsigned + S_LAST), tl.load(unsigned + S_FLAGS),
        tl.load(unsigned + S_NUM_AGES),
    )  # fmt: skip
