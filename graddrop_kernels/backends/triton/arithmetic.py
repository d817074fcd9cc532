"""The AdamW update in Triton, operation by operation as in csrc/adamw.h. Every fused multiply-add is written out.

In some operations Triton's interpreter differs from a GPU. Only this file handles that, behind INTERPRETED.
"""

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def fma(a, b, c, INTERPRETED: tl.constexpr):
    """a * b + c, rounded once."""
    if INTERPRETED:
        # Triton's interpreter rounds twice (3.6, 3.7). Here the sum is rounded to odd in float64 and then to float32,
        # which is exact (Boldo and Melquiond, 2008), as in rounding.py.
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
    else:
        return tl.fma(a, b, c)


@triton.jit
def negated(x):
    """-x, also for a zero. Triton's own minus is 0 - x, which makes +0 of +0."""
    return x * -1.0


@triton.jit
def to_float32(x, INTERPRETED: tl.constexpr):
    """A 16-bit or float32 number as float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter converts denormals wrongly
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_storage(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 -> dtype, to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x != x, bits | 0x00400000, rounded)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def stochastic_bfloat16(x, words):
    """Rounds float32 to one of the two bfloat16 around it, by the upper half of its random word. Returns float32.

    Values that are bfloat16 already stay as they are. Infinities and NaN are left to the usual rounding.
    """
    bits = (x.to(tl.uint32, bitcast=True) + (words >> 16)) & 0xFFFF0000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def store(at, new, old, moves, in_bounds, dtype: tl.constexpr, FROZEN: tl.constexpr, INTERPRETED: tl.constexpr):
    """Stores ``new``. With FROZEN it stores the old bits of elements that do not move."""
    new = to_storage(new, dtype, INTERPRETED)
    if FROZEN:
        new = tl.where(moves, new, old)
    tl.store(at, new, mask=in_bounds)


@triton.jit
def new_moments(g, m, v, vmax, beta1, beta2, AMSGRAD: tl.constexpr, INTERPRETED: tl.constexpr):
    """(exp_avg, exp_avg_sq, max_exp_avg_sq) in float32, in the order of csrc/adamw.h; g is masked and scaled."""
    m = fma(beta1, m, fma(negated(beta1), g, g, INTERPRETED), INTERPRETED)
    g_squared = g * g
    finite = tl.minimum(g_squared, FLOAT32_MAX)  # an infinite square gives an infinite v, not NaN: see csrc/adamw.h
    v = fma(beta2, v, fma(negated(beta2), finite, g_squared, INTERPRETED), INTERPRETED)
    if AMSGRAD:
        vmax = tl.where(v > vmax, v, vmax)
    return m, v, vmax


@triton.jit
def new_parameter(
    p, m, vhat, lr_weight_decay, eps, step_size, bc2_sqrt, bc2_sqrt_reciprocal, decay, CAUTIOUS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The parameter in float32 from the new moments; vhat is exp_avg_sq, or its maximum for amsgrad."""
    numerator = step_size * m
    # decoupled weight decay; skipped when 0, so that an infinite parameter does not become NaN
    if CAUTIOUS:  # and where the update moves the parameter away from 0
        decay = decay & ((numerator * p < 0) == 0)
    p = tl.where(decay, fma(negated(lr_weight_decay), p, p, INTERPRETED), p)
    root = tl.sqrt_rn(vhat)
    # root / bc2_sqrt, rounded once: see div_by_constant in csrc/adamw.h
    quotient = tl.minimum(root * bc2_sqrt_reciprocal, FLOAT32_MAX)
    remainder = fma(negated(quotient), bc2_sqrt + tl.zeros_like(quotient), root, INTERPRETED)
    denom = fma(remainder, bc2_sqrt_reciprocal, quotient, INTERPRETED) + eps
    return p - tl.div_rn(numerator, denom)
