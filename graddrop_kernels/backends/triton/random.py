"""Random numbers in Triton: Philox draws in the order of the elements in memory, and normal numbers.

csrc/philox.h and gaussian.h compute the same. The draws of a vector of VEC elements are made as separate tensors and
joined in bit-reversed order (tl.join adds the innermost dimension), which gives the order of the data. So no element
changes its thread, and neither shared memory nor a barrier is needed. VEC = 1 makes a call for every element.
"""

import triton
import triton.language as tl

from .arithmetic import fma

DOMAIN_ELEMENT, DOMAIN_BUCKET, DOMAIN_GAUSSIAN = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)
DOMAIN_ROUNDING = tl.constexpr(4)


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
    """The one of the four values that ``index`` selects."""
    return tl.where((index & 2) != 0, tl.where((index & 1) != 0, d, c), tl.where((index & 1) != 0, b, a))


@triton.jit
def global_index(start, row, ROWS: tl.constexpr):
    """Local element indices -> indices in the whole parameter (RowBlock)."""
    if ROWS:
        line = start // row.local_inner
        return row.base + line * row.global_inner + (start - line * row.local_inner)
    else:
        return row.base + start


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
def high16(start, row, domain: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr):
    """The 16-bit draws of the VEC elements from each local index in start, in the upper halves of uint32 [VEC * N].

    The lower halves hold any bits: a draw is compared with a shifted threshold, and need not be shifted itself.
    """
    element = global_index(start, row, ROWS)
    w0, w1, w2, w3 = philox(element >> 3, row.draw, domain, row.k0, row.k1)
    if VEC == 8:
        return join8(w0 << 16, w0, w1 << 16, w1, w2 << 16, w2, w3 << 16, w3)
    elif VEC == 4:  # two neighbouring threads make the same call and take half of it each
        upper = (element & 4) != 0
        a, b = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
        return join4(a << 16, a, b << 16, b)
    else:
        word = select4((element >> 1).to(tl.int32), w0, w1, w2, w3)
        return tl.where((element & 1) != 0, word, word << 16)


@triton.jit
def words32(start, row, draw, domain: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr):
    """The 32-bit words of the VEC elements from each local index in start: uint32 [VEC * N]."""
    element = global_index(start, row, ROWS)
    q = element >> 2
    w0, w1, w2, w3 = philox(q, draw, domain, row.k0, row.k1)
    if VEC == 8:
        w4, w5, w6, w7 = philox(q + 1, draw, domain, row.k0, row.k1)
        return join8(w0, w1, w2, w3, w4, w5, w6, w7)
    elif VEC == 4:
        return join4(w0, w1, w2, w3)
    else:
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
