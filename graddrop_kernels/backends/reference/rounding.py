"""Two ways to round the reference's operations: as PyTorch happens to, or once per operation as the fused kernels do.
Also stochastic rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Fma = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Rounding(NamedTuple):
    """``fma(a, b, c)`` is a * b + c. Both functions take tensors of one floating dtype."""

    fma: Fma
    sqrt: Callable[[torch.Tensor], torch.Tensor]


def _exact_fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c rounded once to float32, for float32 tensors (float64 tensors: not exact).

    The product of two float32 is exact in float64; the sum is not always, and rounding it twice (to float64, then to
    float32) can err. Rounding it to odd first cannot: the 53 bits of a float64 are more than the 24 + 2 that this needs
    (Boldo and Melquiond, 2008).
    """
    if a.dtype == torch.float64:
        return a * b + c
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # total + error == product + c exactly (Knuth's TwoSum)
    even = (total.view(torch.int64) & 1) == 0
    odd = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).double())
    return torch.where((error != 0) & even & total.isfinite(), odd, total).float()


def _exact_sqrt(a: torch.Tensor) -> torch.Tensor:
    """The square root rounded once to float32.

    torch.sqrt on CPU is off by an ulp for 20 % of float32 inputs (torch 2.13, measured).
    """
    return a.sqrt() if a.dtype == torch.float64 else a.double().sqrt().float()


PLAIN = Rounding(lambda a, b, c: a * b + c, torch.sqrt)
EXACT = Rounding(_exact_fma, _exact_sqrt)


class _RoundedTo(torch.autograd.Function):
    """The second number, with the derivative of the first: 1, as torch has it of ``a.to(torch.bfloat16)``."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def stochastic_bfloat16(a: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to one of the two bfloat16 around it, at odds that make the mean exact. Returns float32.

    Args:
        a: float32. Values that are bfloat16 already stay as they are; infinities and NaN are rounded as usual.
        words: int64 of the same shape, random 32-bit words. Their upper halves decide, since a bfloat16 lacks the
            lower half of a float32.
    """
    bits = (a.detach().view(torch.int32) + (words >> 16).to(torch.int32)) & -65536
    rounded = torch.where(a.isfinite(), bits.view(torch.float32), a.detach())
    return _RoundedTo.apply(a, rounded) if a.requires_grad else rounded  # type: ignore[no-untyped-call]
