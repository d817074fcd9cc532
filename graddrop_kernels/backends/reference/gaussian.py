"""Standard normal numbers from 32-bit words by the inverse error function,
in operations that every backend can repeat bit for bit.

z = sqrt(2) erfinv(x) for x uniform in (-1, 1), with M. Giles' single-precision polynomials ("Approximating the erfinv
function", GPU Computing Gems, 2011). Library logarithms differ from machine to machine in the last bit, so the
logarithm is a polynomial too. csrc/gaussian.h holds the same operations and numbers; tests compare the two.
"""

from collections.abc import Callable

import torch

from .rounding import Fma, Rounding

# ln(1 + f) = f - f^2/2 + f^3 * P(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], Horner order (Cephes logf).
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def normal_from_words(words: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """32-bit words (int64 tensor) -> float32 normal numbers, |z| <= 5.42."""
    fma = rounding.fma
    scalar: Callable[[float], torch.Tensor] = lambda value: torch.tensor(
        value, dtype=torch.float32, device=words.device
    )
    signed = (words - ((words >> 31) << 32)) >> 8  # the top 24 bits, two's complement
    x = (signed.float() + 0.5) * scalar(2.0**-23)  # exact: odd multiples of 2^-24, never 0 or +-1
    w = -_log((1 - x) * (1 + x), fma, scalar)
    central = w < 5
    t = torch.where(central, w - scalar(2.5), rounding.sqrt(w) - 3)
    z = torch.where(central, scalar(CENTRE[0]), scalar(TAIL[0])).expand_as(t)
    for centre, tail in zip(CENTRE[1:], TAIL[1:]):
        z = fma(z, t, torch.where(central, scalar(centre), scalar(tail)))
    return z * x * scalar(SQRT2)


def _log(y: torch.Tensor, fma: Fma, scalar: Callable[[float], torch.Tensor]) -> torch.Tensor:
    """ln(y) for normal float32 y in (0, 1]."""
    bits = y.view(torch.int32) - 0x3F3504F3  # so that the mantissa below is in [sqrt(1/2), sqrt(2))
    exponent = (bits >> 23).float()
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    polynomial = scalar(LOG[0]).expand_as(f)
    for coefficient in LOG[1:]:
        polynomial = fma(polynomial, f, scalar(coefficient))
    square = f * f
    log1p = f + fma(polynomial, f * square, scalar(-0.5) * square)
    return fma(exponent, scalar(LN2), log1p)
