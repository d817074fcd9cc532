"""Standard normal numbers in pairs, in operations that every backend can repeat bit for bit.

The method of Box and Muller: two random words give a radius sqrt(-2 ln y) and an angle, and these two numbers. Library
functions differ from machine to machine in the last bit. So the logarithm, the cosine and the sine are polynomials,
minimax fits in float64 whose coefficients were rounded. csrc/gaussian.h holds the same operations and numbers; tests
compare the two.
"""

import torch

from ...masks.philox import DOMAIN_GAUSSIAN, words32
from .rounding import Fma, Rounding

# -2 ln(1 + f) = -2 f + f^2 * P(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], Horner order.
LOG = (0.21372777, -0.3234426, 0.3413759, -0.3981573, 0.49969336, -0.66669166, 1.0000015)
MINUS_2_LN2 = -1.3862944
COS_PI = (0.2196968, -1.3318802, 4.058412, -4.934793, 0.99999994)  # cos(pi x) = P(x^2) for |x| <= 1/2
SIN_PI_BY_X = (0.077659406, -0.5982922, 2.5500777, -5.1677103, 3.1415927)  # sin(pi x) / x


def normals(
    key: int, draw: int, first: int, count: int, device: torch.device | None = None, *, rounding: Rounding
) -> torch.Tensor:
    """The normal numbers ``first .. first + count`` of a stream, float32 (count,): 2 k and 2 k + 1 are a pair."""
    lead = first & 1
    words = words32(key, draw, DOMAIN_GAUSSIAN, first - lead, (lead + count + 1) & -2, device)
    return normals_from_words(words, rounding)[lead : lead + count]


def normals_from_words(words: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Pairs of 32-bit words (int64 tensor) -> as many float32 normal numbers, |z| <= 5.65."""
    fma = rounding.fma
    first, second = words.to(torch.int32).view(-1, 2).unbind(1)  # its conversion wraps
    radius = _float(first >> 9 & 0x7FFFFF | 0x3F800000)  # this and the next are multiples of 2^-23 in [1, 2)
    angle = _float(second >> 8 & 0x7FFFFF | 0x3F800000)
    radius = rounding.sqrt(_minus_2_log(2 - radius, fma))
    radius = torch.where(second < 0, -radius, radius)
    x = 1.5 - angle  # in half turns, in (-1/2, 1/2]; the sign of the radius turns by half a turn
    s = x * x
    cosine, sine = radius * _polynomial(COS_PI, s, fma), radius * (x * _polynomial(SIN_PI_BY_X, s, fma))
    return torch.stack((cosine, sine), dim=1).flatten()


def _minus_2_log(y: torch.Tensor, fma: Fma) -> torch.Tensor:
    """-2 ln(y) for normal float32 y in (0, 1]."""
    bits = y.view(torch.int32) - 0x3F3504F3  # so that the mantissa below is in [sqrt(1/2), sqrt(2))
    f = _float((bits & 0x7FFFFF) + 0x3F3504F3) - 1
    of_mantissa = fma(_polynomial(LOG, f, fma), f * f, -2 * f)
    return fma((bits >> 23).float(), f.new_tensor(MINUS_2_LN2), of_mantissa)


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor, fma: Fma) -> torch.Tensor:
    """The sum of coefficients times powers of x, the highest power first."""
    total = x.new_tensor(coefficients[0]).expand_as(x)
    for coefficient in coefficients[1:]:
        total = fma(total, x, x.new_tensor(coefficient))
    return total


def _float(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float32)
