"""The Triton kernels of a step: one program a tensor for the scalars, one program a chunk of elements for the update.

They read the tables of csrc/tensor_table.h (backends/device_tables.py puts them on the device) and compute what
csrc/adamw.h, philox.h, mask.h and gaussian.h compute, bit for bit in the exact mode. Every fused multiply-add is
written out. Nothing that changes from step to step is a constant of the compilation.

Formulation, measured on the compiled code (tests/test_triton_contract.py):
  - a program loops over a chunk in blocks of BLOCK elements; each thread holds 8 of them, as one 16-byte access a
    16-bit tensor and two a float32 one. Beside float32 tensors a vector is VEC = 4 elements, else 8.
  - one Philox call gives the draws of 8 elements. The draws of a vector are made as VEC separate tensors, compared,
    and joined (tl.join adds the innermost dimension) in bit-reversed order, which is the memory order of the data:
    no element changes its thread, so there is no shared memory and no barrier.
  - a tensor that is not so aligned goes through the GENERAL form, VEC = 1: a Philox call for every element.
"""

import triton
import triton.language as tl

from .tensor_table import MASK_KINDS

# Columns of a TensorRow, in 8-byte words.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, MASK_WORDS = (tl.constexpr(i) for i in range(7))
NUMEL, BASE, LOCAL_INNER, GLOBAL_INNER, KEY, HYPER = (tl.constexpr(i) for i in range(7, 13))
TENSOR_WORDS = tl.constexpr(13)
# Columns of a HyperRow, in 8-byte words, then those of its 4-byte part.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SCALE, AGE_RATE, GLOBAL_STEP, AGES, NUM_AGES, DRAW = (
    tl.constexpr(i) for i in range(11)
)
KIND, FROZEN, THRESHOLD, BUCKETS, FIRST_BUCKET, LAST_BUCKET = (tl.constexpr(i) for i in range(22, 28))
MAXIMIZE = tl.constexpr(30)
HYPER_WORDS = tl.constexpr(16)
# Columns of a StepRow, in 4-byte words.
LR_WEIGHT_DECAY, S_BETA1, S_BETA2, S_EPS, STEP_SIZE, BC2_SQRT, BC2_SQRT_RECIPROCAL, FACTOR, DEVIATION = (
    tl.constexpr(i) for i in range(9)
)
S_THRESHOLD, S_DRAW, S_BUCKETS, S_FIRST, S_LAST, S_FLAGS, S_NUM_AGES = (tl.constexpr(i) for i in range(9, 16))
STEP_WORDS = tl.constexpr(16)
SKIP_FLAG, OFF_FLAG, FROZEN_FLAG, DECAY_FLAG = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)

KEEP, OFF, BERNOULLI, GAUSSIAN, BUCKET, FIXED = (
    tl.constexpr(MASK_KINDS[kind]) for kind in ("keep", "off", "bernoulli", "gaussian", "bucket", "fixed")
)
DOMAIN_ELEMENT, DOMAIN_BUCKET, DOMAIN_GAUSSIAN = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@triton.jit
def fma(a, b, c, INTERPRETED: tl.constexpr):
    """a * b + c, rounded once."""
    if not INTERPRETED:
        return tl.fma(a, b, c)
    # Triton's interpreter rounds twice (3.6, 3.7). Here the sum is rounded to odd in float64 and then to float32, which
    # is exact (Boldo and Melquiond, 2008), as in rounding.py.
    product = a.to(tl.float64) * b.to(tl.float64)
    addend = c.to(tl.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.to(tl.int64, bitcast=True)
    finite = tl.abs(total) < float("inf")
    step = tl.where((error > 0) == (total > 0), 1, -1)
    bits = tl.where((error != 0) & ((bits & 1) == 0) & finite, bits + step, bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def to_storage(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 -> dtype, to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x != x, bits | 0x00400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def adamw(
    p, g, m, v, vmax, lr_weight_decay, beta1, beta2, eps, step_size, bc2_sqrt, bc2_sqrt_reciprocal, decay,
    AMSGRAD: tl.constexpr, EXACT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One AdamW update in float32, in the order of csrc/adamw.h. g is masked, scaled and signed."""
    # decoupled weight decay; skipped when 0, so that an infinite parameter does not become NaN
    p = tl.where(decay, fma(-lr_weight_decay, p, p, INTERPRETED), p)
    m = fma(beta1, m, fma(-beta1, g, g, INTERPRETED), INTERPRETED)
    g_squared = g * g
    v = fma(beta2, v, fma(-beta2, g_squared, g_squared, INTERPRETED), INTERPRETED)
    vhat = v
    if AMSGRAD:
        vmax = tl.where(v > vmax, v, vmax)
        vhat = vmax
    if EXACT:
        root = tl.sqrt_rn(vhat)
        # root / bc2_sqrt, rounded once: see div_by_constant in csrc/adamw.h
        quotient = tl.minimum(root * bc2_sqrt_reciprocal, FLOAT32_MAX)
        remainder = fma(-quotient, bc2_sqrt + tl.zeros_like(quotient), root, INTERPRETED)
        denom = fma(remainder, bc2_sqrt_reciprocal, quotient, INTERPRETED) + eps
        p = p - tl.div_rn(step_size * m, denom)
    else:
        denom = fma(tl.sqrt(vhat), bc2_sqrt_reciprocal, eps, INTERPRETED)
        p = p - (step_size * m) / denom
    return p, m, v, vmax


# --- random numbers ---------------------------------------------------------------------------------------------------


@triton.jit
def philox(q, draw, domain: tl.constexpr, k0, k1):
    """Philox4x32-10 of the counters (low q, high q, draw, domain): four uint32 words. csrc/philox.h."""
    c0 = q.to(tl.uint32)
    c1 = (q >> 32).to(tl.uint32)
    c2 = draw + tl.zeros_like(c0)
    c3 = tl.full(c0.shape, domain, tl.uint32)
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 bit multiplication each: cheaper than a high and a low one.
        x = c0.to(tl.uint64) * 0xD2511F53
        y = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (y >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = y.to(tl.uint32)
        c2 = (x >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = x.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def select4(index, a, b, c, d):
    """The index-th of four."""
    return tl.where((index & 2) != 0, tl.where((index & 1) != 0, d, c), tl.where((index & 1) != 0, b, a))


@triton.jit
def global_index(start, row, ROWS: tl.constexpr):
    """Local element indices -> indices in the whole parameter (RowBlock)."""
    base = tl.load(row + BASE)
    if ROWS:
        inner = tl.load(row + LOCAL_INNER)
        line = start // inner
        return base + line * tl.load(row + GLOBAL_INNER) + (start - line * inner)
    return base + start


@triton.jit
def join4(a, b, c, d):
    """[N] x 4 -> [4 N], the four of an index side by side."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0] * 4])


@triton.jit
def join8(a, b, c, d, e, f, g, h):
    """[N] x 8 -> [8 N]."""
    low = tl.join(tl.join(a, e), tl.join(c, g))
    return tl.reshape(tl.join(low, tl.join(tl.join(b, f), tl.join(d, h))), [a.shape[0] * 8])


@triton.jit
def draw16(words0, words1, words2, words3):
    """The eight 16-bit draws of a Philox call, in element order."""
    return (
        words0 & 0xFFFF, words0 >> 16, words1 & 0xFFFF, words1 >> 16,
        words2 & 0xFFFF, words2 >> 16, words3 & 0xFFFF, words3 >> 16,
    )  # fmt: skip


@triton.jit
def uniform16(start, row, draw, domain: tl.constexpr, k0, k1, VEC: tl.constexpr, ROWS: tl.constexpr):
    """The draws of VEC elements from each local index in start: 1, 4 or 8 uint32 tensors, as a tuple."""
    element = global_index(start, row, ROWS)
    w0, w1, w2, w3 = philox(element >> 3, draw, domain, k0, k1)
    if VEC == 8:
        return draw16(w0, w1, w2, w3)
    if VEC == 4:  # two neighbouring threads make the same call and take half of it each
        upper = (element & 4) != 0
        a, b = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
        return a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    word = select4((element >> 1).to(tl.int32), w0, w1, w2, w3)
    return (tl.where((element & 1) != 0, word >> 16, word & 0xFFFF),)


@triton.jit
def words32(start, row, draw, k0, k1, VEC: tl.constexpr, ROWS: tl.constexpr):
    """The 32-bit words of the VEC elements from each local index in start, for GaussianGradDrop: uint32 [VEC * N]."""
    element = global_index(start, row, ROWS)
    q = element >> 2
    w0, w1, w2, w3 = philox(q, draw, DOMAIN_GAUSSIAN, k0, k1)
    if VEC == 8:
        w4, w5, w6, w7 = philox(q + 1, draw, DOMAIN_GAUSSIAN, k0, k1)
        return join8(w0, w1, w2, w3, w4, w5, w6, w7)
    if VEC == 4:
        return join4(w0, w1, w2, w3)
    return select4(element.to(tl.int32), w0, w1, w2, w3)


@triton.jit
def horner9(t, c0, c1, c2, c3, c4, c5, c6, c7, c8, INTERPRETED: tl.constexpr):
    """((c0 t + c1) t + ...) t + c8."""
    z = fma(tl.full(t.shape, c0, tl.float32), t, tl.full(t.shape, c1, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c2, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c3, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c4, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c5, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c6, tl.float32), INTERPRETED)
    z = fma(z, t, tl.full(t.shape, c7, tl.float32), INTERPRETED)
    return fma(z, t, tl.full(t.shape, c8, tl.float32), INTERPRETED)


@triton.jit
def normal(word, INTERPRETED: tl.constexpr):
    """Standard normal numbers from 32-bit words: csrc/gaussian.h, operation by operation."""
    x = ((word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    y = (1.0 - x) * (1.0 + x)
    # ln(y) = exponent ln(2) + ln(1 + f)
    shifted = y.to(tl.int32, bitcast=True) - 0x3F3504F3
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    polynomial = horner9(
        f, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1, INTERPRETED,
    )  # fmt: skip
    square = f * f
    log1p = f + fma(polynomial, f * square, -0.5 * square, INTERPRETED)
    log = fma((shifted >> 23).to(tl.float32), tl.full(f.shape, 0.6931471805599453, tl.float32), log1p, INTERPRETED)
    w = 0.0 - log
    t = w - 2.5
    centre = horner9(
        t, 2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
        -0.00125372503, -0.00417768164, 0.246640727, 1.50140941, INTERPRETED,
    )  # fmt: skip
    t = tl.sqrt_rn(w) - 3.0
    tail = horner9(
        t, -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
        -0.0076224613, 0.00943887047, 1.00167406, 2.83297682, INTERPRETED,
    )  # fmt: skip
    return tl.where(w < 5.0, centre, tail) * x * 1.4142135623730951


# --- masks ------------------------------------------------------------------------------------------------------------


@triton.jit
def byte_of_bits(words, plane, plane_bytes, start, VEC: tl.constexpr, in_range):
    """The bits of the VEC elements from each local index in start, lowest first, of a bit-plane."""
    at = words + plane * plane_bytes + (start >> 3)
    byte = tl.load(at, mask=in_range, other=0).to(tl.uint32)
    if VEC == 8:
        return byte
    return byte >> (start & 7).to(tl.uint32)


@triton.jit
def join_bits(byte, VEC: tl.constexpr):
    """Bits 0 .. VEC - 1 of each element of byte, in order: uint32 0 or 1, [VEC * N]."""
    if VEC == 8:
        return join8(byte & 1, (byte >> 1) & 1, (byte >> 2) & 1, (byte >> 3) & 1,
                     (byte >> 4) & 1, (byte >> 5) & 1, (byte >> 6) & 1, (byte >> 7) & 1)  # fmt: skip
    if VEC == 4:
        return join4(byte & 1, (byte >> 1) & 1, (byte >> 2) & 1, (byte >> 3) & 1)
    return byte & 1


@triton.jit
def at_least(u16, threshold, VEC: tl.constexpr):
    """Whether each draw is at least the threshold: bool [VEC * N]."""
    if VEC == 8:
        a, b, c, d, e, f, g, h = u16
        return join8(a >= threshold, b >= threshold, c >= threshold, d >= threshold,
                     e >= threshold, f >= threshold, g >= threshold, h >= threshold)  # fmt: skip
    if VEC == 4:
        a, b, c, d = u16
        return join4(a >= threshold, b >= threshold, c >= threshold, d >= threshold)
    return u16[0] >= threshold


@triton.jit
def buckets_of(u16, buckets, VEC: tl.constexpr):
    """The bucket of each draw: uint32 [VEC * N]."""
    if VEC == 8:
        a, b, c, d, e, f, g, h = u16
        return join8((a * buckets) >> 16, (b * buckets) >> 16, (c * buckets) >> 16, (d * buckets) >> 16,
                     (e * buckets) >> 16, (f * buckets) >> 16, (g * buckets) >> 16, (h * buckets) >> 16)  # fmt: skip
    if VEC == 4:
        a, b, c, d = u16
        return join4((a * buckets) >> 16, (b * buckets) >> 16, (c * buckets) >> 16, (d * buckets) >> 16)
    return (u16[0] * buckets) >> 16


@triton.jit
def keep_and_bucket(
    row, scalars, block_start, numel, k0, k1,
    KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(keep, bucket) of the BLOCK elements from block_start on: the mask rule. PLANES < 0: buckets are recomputed."""
    start = block_start + tl.arange(0, BLOCK // VEC) * VEC
    bucket = tl.zeros([BLOCK], tl.uint32)
    if KIND_ == BERNOULLI:
        u16 = uniform16(start, row, tl.load(scalars + S_DRAW), DOMAIN_ELEMENT, k0, k1, VEC, ROWS)
        return at_least(u16, tl.load(scalars + S_THRESHOLD), VEC), bucket
    words = tl.load(row + MASK_WORDS).to(tl.pointer_type(tl.uint8))
    if KIND_ == FIXED:
        return join_bits(byte_of_bits(words, 0, 0, start, VEC, start < numel), VEC) != 0, bucket
    if PLANES < 0:
        u16 = uniform16(start, row, tl.load(scalars + S_DRAW), DOMAIN_BUCKET, k0, k1, VEC, ROWS)
        bucket = buckets_of(u16, tl.load(scalars + S_BUCKETS), VEC)
    else:
        plane_bytes = ((numel + 31) >> 5) << 2
        for plane in tl.static_range(PLANES):
            byte = byte_of_bits(words, plane, plane_bytes, start, VEC, start < numel)
            bucket += join_bits(byte, VEC) << plane
    return (tl.load(scalars + S_FIRST) <= bucket) & (bucket <= tl.load(scalars + S_LAST)), bucket


# --- the update -------------------------------------------------------------------------------------------------------


@triton.jit
def typed(row, column, dtype: tl.constexpr, VEC: tl.constexpr):
    """A pointer of a TensorRow, with what is known of its alignment."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, VEC * (dtype.primitive_bitwidth // 8))


@triton.jit
def update_block(
    row, scalars, by_age, grad_scale, block_start, numel, k0, k1,
    P: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, AGES_: tl.constexpr, GRAD_SCALE: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Masks, scales and updates the elements [block_start, block_start + BLOCK) of a tensor; FULL: all are in it."""
    offsets = block_start + tl.arange(0, BLOCK)
    in_bounds = None if FULL else offsets < numel
    other = None if FULL else 0.0
    p_at = typed(row, PARAM, P, VEC) + offsets
    g_at = typed(row, GRAD, P, VEC) + offsets
    m_at = typed(row, EXP_AVG, M, VEC) + offsets
    v_at = typed(row, EXP_AVG_SQ, M, VEC) + offsets
    flags = tl.load(scalars + S_FLAGS)
    as_float = scalars.to(tl.pointer_type(tl.float32))

    # All loads first, so that they are in flight while the random numbers are made.
    if KIND_ == KEEP:  # rows of a dropped block: the gradient counts as 0 and is not read
        wanted = (flags & OFF_FLAG) == 0
        g_old = tl.load(g_at, mask=wanted if FULL else in_bounds & wanted, other=0.0)
    else:
        g_old = tl.load(g_at, mask=in_bounds, other=other)
    m_old = tl.load(m_at, mask=in_bounds, other=other)
    v_old = tl.load(v_at, mask=in_bounds, other=other)
    p_old = tl.load(p_at, mask=in_bounds, other=other)
    vmax_old = v_old
    if AMSGRAD:
        vmax_at = typed(row, MAX_EXP_AVG_SQ, M, VEC) + offsets
        vmax_old = tl.load(vmax_at, mask=in_bounds, other=other)

    g = g_old.to(tl.float32)
    if GRAD_SCALE:
        g = tl.div_rn(g, tl.load(grad_scale) + tl.zeros_like(g))
        tl.store(g_at, to_storage(g, P, INTERPRETED), mask=in_bounds)
    g = g * tl.load(as_float + FACTOR)
    if KIND_ == GAUSSIAN:
        start = block_start + tl.arange(0, BLOCK // VEC) * VEC
        z = normal(words32(start, row, tl.load(scalars + S_DRAW), k0, k1, VEC, ROWS), INTERPRETED)
        g = g * fma(z, tl.load(as_float + DEVIATION), tl.full(z.shape, 1.0, tl.float32), INTERPRETED)
    keep, bucket = True, 0
    if KIND_ == BERNOULLI or KIND_ == BUCKET or KIND_ == FIXED:
        keep, bucket = keep_and_bucket(row, scalars, block_start, numel, k0, k1, KIND_, PLANES, VEC, ROWS, BLOCK)
        g = tl.where(keep, g, 0.0)  # selection: a dropped inf or NaN is dropped

    if AGES_:  # every bucket has its own bias corrections
        age = tl.minimum(bucket, tl.load(scalars + S_NUM_AGES) - 1)
        at = by_age + 4 * age
        step_size, bc2_sqrt, bc2_sqrt_reciprocal = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    else:
        step_size, bc2_sqrt = tl.load(as_float + STEP_SIZE), tl.load(as_float + BC2_SQRT)
        bc2_sqrt_reciprocal = tl.load(as_float + BC2_SQRT_RECIPROCAL)
    p, m, v, vmax = adamw(
        p_old.to(tl.float32), g, m_old.to(tl.float32), v_old.to(tl.float32), vmax_old.to(tl.float32),
        tl.load(as_float + LR_WEIGHT_DECAY), tl.load(as_float + S_BETA1), tl.load(as_float + S_BETA2),
        tl.load(as_float + S_EPS), step_size, bc2_sqrt, bc2_sqrt_reciprocal, (flags & DECAY_FLAG) != 0,
        AMSGRAD, EXACT, INTERPRETED,
    )  # fmt: skip

    p_new, m_new, v_new = to_storage(p, P, INTERPRETED), to_storage(m, M, INTERPRETED), to_storage(v, M, INTERPRETED)
    vmax_new = to_storage(vmax, M, INTERPRETED)
    if FROZEN_:
        moves = keep | ((flags & FROZEN_FLAG) == 0)
        p_new, m_new = tl.where(moves, p_new, p_old), tl.where(moves, m_new, m_old)
        v_new, vmax_new = tl.where(moves, v_new, v_old), tl.where(moves, vmax_new, vmax_old)
    tl.store(p_at, p_new, mask=in_bounds)
    tl.store(m_at, m_new, mask=in_bounds)
    tl.store(v_at, v_new, mask=in_bounds)
    if AMSGRAD:
        tl.store(vmax_at, vmax_new, mask=in_bounds)


@triton.jit
def masked_adamw_kernel(
    rows, step_rows, by_age_table, chunks, grad_scale, age_stride,
    P: tl.constexpr, M: tl.constexpr, KIND_: tl.constexpr, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    AMSGRAD: tl.constexpr, FROZEN_: tl.constexpr, AGES_: tl.constexpr, GRAD_SCALE: tl.constexpr, EXACT: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One masked AdamW step on one chunk: BLOCKS blocks of BLOCK elements of one tensor."""
    chunk = tl.load(chunks + tl.program_id(0))
    tensor = chunk >> 40
    row = rows + tensor * TENSOR_WORDS
    scalars = step_rows + tensor * STEP_WORDS
    by_age = by_age_table + tensor * age_stride * 4
    first = (chunk & 0xFFFFFFFFFF) * (BLOCK * BLOCKS)
    numel = tl.load(row + NUMEL)
    key = tl.load(row + KEY)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    if (tl.load(scalars + S_FLAGS) & SKIP_FLAG) == 0:
        for block in range(BLOCKS):
            start = tl.multiple_of(first + block * BLOCK, BLOCK)
            if start + BLOCK <= numel:
                update_block(row, scalars, by_age, grad_scale, start, numel, k0, k1, P, M, KIND_, PLANES, VEC, ROWS,
                             AMSGRAD, FROZEN_, AGES_, GRAD_SCALE, EXACT, INTERPRETED, BLOCK, True)  # fmt: skip
            elif start < numel:
                update_block(row, scalars, by_age, grad_scale, start, numel, k0, k1, P, M, KIND_, PLANES, VEC, ROWS,
                             AMSGRAD, FROZEN_, AGES_, GRAD_SCALE, EXACT, INTERPRETED, BLOCK, False)  # fmt: skip


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


@triton.jit
def prologue_kernel(
    rows, hypers, step_rows, by_age_table, found_inf, age_stride,
    FOUND_INF: tl.constexpr, AGES_: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Advances the step count of one tensor and writes its StepRow, and its bias corrections by age where it has ages.

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
        tl.store(step_at, completed + 1.0)

        lr, weight_decay = tl.load(doubles + LR).to(tl.float32), tl.load(doubles + WEIGHT_DECAY).to(tl.float32)
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
        sign = tl.where(tl.load(ints + MAXIMIZE) != 0, -1.0, 1.0)
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
        tl.store(scalars + S_FLAGS, flags.to(tl.uint32))

        if AGES_:
            by_age = by_age_table + tensor * age_stride * 4
            num_ages = tl.load(hyper + NUM_AGES)
            tl.store(scalars + S_NUM_AGES, tl.maximum(num_ages, 1).to(tl.uint32))
            ageless = first_lane & (num_ages == 0)  # one bucket for all, with the scalars above
            tl.store(by_age + lane, step_size, mask=ageless)
            tl.store(by_age + 1 + lane, bc2_sqrt, mask=ageless)
            tl.store(by_age + 2 + lane, bc2_sqrt_reciprocal, mask=ageless)
            ages = tl.load(hyper + AGES).to(tl.pointer_type(tl.int64))
            for begin in range(0, num_ages, LANES):
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
