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
DOMAIN_MOMENTS = tl.constexpr(5)


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
def add_power(total, x, coefficient, INTERPRETED: tl.constexpr):
    """A turn of Horner's method."""
    return fma(total, x, tl.full(x.shape, coefficient, tl.float32), INTERPRETED)


@triton.jit
def normal_pair(first, second, INTERPRETED: tl.constexpr):
    """Two standard normal numbers from two uint32 words: csrc/gaussian.h, operation by operation."""
    y = 2.0 - ((first >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    # -2 ln(y) = -2 exponent ln(2) - 2 ln(1 + f)
    shifted = y.to(tl.int32, bitcast=True) - 0x3F3504F3
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    log = add_power(tl.full(f.shape, 0.21372777, tl.float32), f, -0.3234426, INTERPRETED)
    log = add_power(log, f, 0.3413759, INTERPRETED)
    log = add_power(log, f, -0.3981573, INTERPRETED)
    log = add_power(log, f, 0.49969336, INTERPRETED)
    log = add_power(log, f, -0.66669166, INTERPRETED)
    log = add_power(log, f, 1.0000015, INTERPRETED)
    log = fma(log, f * f, -2.0 * f, INTERPRETED)
    log = fma((shifted >> 23).to(tl.float32), tl.full(f.shape, -1.3862944, tl.float32), log, INTERPRETED)
    radius = tl.sqrt_rn(log).to(tl.uint32, bitcast=True) ^ (second & 0x80000000)
    radius = radius.to(tl.float32, bitcast=True)  # its sign turns by half a turn
    x = 1.5 - (((second >> 8) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # half turns in (-1/2, 1/2]
    s = x * x
    cosine = add_power(tl.full(s.shape, 0.2196968, tl.float32), s, -1.3318802, INTERPRETED)
    cosine = add_power(cosine, s, 4.058412, INTERPRETED)
    cosine = add_power(cosine, s, -4.934793, INTERPRETED)
    cosine = add_power(cosine, s, 0.99999994, INTERPRETED)
    sine = add_power(tl.full(s.shape, 0.077659406, tl.float32), s, -0.5982922, INTERPRETED)
    sine = add_power(sine, s, 2.5500777, INTERPRETED)
    sine = add_power(sine, s, -5.1677103, INTERPRETED)
    sine = add_power(sine, s, 3.1415927, INTERPRETED)
    return radius * cosine, radius * (x * sine)


@triton.jit
def normals(start, row, VEC: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Standard normal numbers of the VEC elements from each local index in start: float32 [VEC * N]. Those of the
    global indices 2 k and 2 k + 1 are a pair.
    """
    element = global_index(start, row, ROWS)
    q = element >> 2
    w0, w1, w2, w3 = philox(q, row.draw, DOMAIN_GAUSSIAN, row.k0, row.k1)
    if VEC == 1:
        upper = (element & 2) != 0
        even, odd = normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1), INTERPRETED)
        return tl.where((element & 1) != 0, odd, even)
    else:
        a, b = normal_pair(w0, w1, INTERPRETED)
        c, d = normal_pair(w2, w3, INTERPRETED)
        if VEC == 4:
            return join4(a, b, c, d)
        else:
            w4, w5, w6, w7 = philox(q + 1, row.draw, DOMAIN_GAUSSIAN, row.k0, row.k1)
            e, f = normal_pair(w4, w5, INTERPRETED)
            g, h = normal_pair(w6, w7, INTERPRETED)
            return join8(a, b, c, d, e, f, g, h)
