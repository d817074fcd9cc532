"""Bounds on the distance between a backend and "exact", in ulp at the size of a step's operands."""

from typing import NamedTuple

import torch


class Bound(NamedTuple):
    """Bounds on the distance between one step and the exact one from the same state, in ulp at ``operand_sizes``.

    In 16 bits a store may also round the other way, stochastically or not: there any bound but 0 means one ulp of the
    16-bit dtype.
    """

    param: float
    moments: float
    gaussian: float  # for all under a Gaussian mask, whose random numbers go through a logarithm and a sine

    def of(self, key: str, gaussian: bool) -> float:
        """Returns the bound in float32 of the parameter (``"param"``) or of a part of its state."""
        if key == "step":
            return 0
        return self.gaussian if gaussian else self.param if key in ("param", "master_param") else self.moments


# A backend without a row here must have the bits of "exact".
BOUNDS = {
    # Rounds twice where exact rounds once in each fma, and takes torch.sqrt. The largest distances over 25 seeds of
    # `verify --quick` were 4, 1 and 9 (torch 2.13, CPU).
    "reference": Bound(param=8, moments=2, gaussian=16),
}
EXACT = Bound(0, 0, 0)
# The share of stochastically rounded parameters that may be an ulp off. An error in float32 tips a rounding with the
# probability error / (ulp of bfloat16): for the reference at most 0.002 of the parameters were measured. A wrong draw
# is not worse than an ulp either, but shows in 1.6 % of the elements or more.
TIPPED = 1 / 128
# The same of moments. With a beta2 of 0.9999 the reference's (1 - beta2) g^2 is off by up to 2^-24 / (1 - beta2), 0.15
# ulp of bfloat16: 0.035 of exp_avg_sq were measured. A wrong draw shows in a third of the elements that move.
TIPPED_MOMENTS = 1 / 8


def norm_limit(gaussian: bool) -> float:
    """Returns the bound on a norm of gradients, in ulp of float32 from the exact one; the same for every backend.

    Args:
        gaussian: the gradients have Gaussian factors. A backend without a sum of its own takes the reference's factors.
    """
    return BOUNDS["reference"].gaussian if gaussian else 2


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bit patterns of a floating-point tensor, as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def in_dtype(bound: float, dtype: torch.dtype) -> float:
    """Converts a bound from ulp of float32 to ulp of a tensor's dtype."""
    # The store's own ulp plus the float32 error: an ulp of float16 is 2^13 ulp of float32, one of bfloat16 is more.
    return bound if dtype is torch.float32 or not bound else 1 + bound / 2**13


def ulp_at(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns one ulp of ``dtype`` at numbers of this size, float64."""
    finfo = torch.finfo(dtype)
    at_size = torch.frexp(size.double())[1].double().exp2() * finfo.eps / 2
    return at_size.masked_fill(size == 0, 0).clamp(min=finfo.smallest_normal * finfo.eps)


def operand_sizes(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], beta1: float, lr_weight_decay: float,
    exact_moments: bool, cautious: bool, grad: torch.Tensor | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Returns the sizes of the operands of one exact step, float64, by tensor. Rounding errors are relative to these.

    A moment may cancel against its gradient, (1 - beta2) g^2 is a difference of numbers of the size of g^2, and the
    parameter may cancel against its update. If a backend's moments are not exact, the error of the update grows by as
    much as its moments have cancelled.

    Args:
        before, after: {"param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq" with amsgrad, "master_param" where that is
            stepped: float tensors}.
        exact_moments: whether the backend's moments are those of "exact".
        cautious: whether the sign of the new moment decides on weight decay. Where the moment has cancelled, rounding
            does, and the parameter may differ by all of its decay.
        grad: under a Gaussian mask the gradient, as a factor 1 + deviation * z near 0 has cancelled. Else None.
    """
    stepped = "master_param" if "master_param" in before else "param"
    p, m, v = (before[key].double().abs() for key in (stepped, "exp_avg", "exp_avg_sq"))
    m_new, v_new = after["exp_avg"].double(), after["exp_avg_sq"].double()
    vhat = after["max_exp_avg_sq"].double() if "max_exp_avg_sq" in after else v_new
    g = (m_new - beta1 * before["exp_avg"].double()).abs() / (1 - beta1)  # the gradient after mask and scale
    if grad is not None:
        g = g.maximum(grad.double().abs())
    m, v = m.maximum(g), v.maximum(g * g)
    update = (after[stepped].double() - (1 - lr_weight_decay) * before[stepped].double()).abs()
    if not exact_moments:
        update *= m / m_new.abs().clamp(min=2**-24 * m).clamp(min=1e-300)
        update *= (v / vhat.clamp(min=1e-300)).clamp(min=1)
    p = p.maximum(update).maximum(after[stepped].double().abs())  # the store rounds at the size of the result
    if cautious and not exact_moments:
        unsure = m_new.abs() <= 2**-18 * m
        p = torch.where(unsure, p.maximum(2**24 * lr_weight_decay * before[stepped].double().abs()), p)
    return {stepped: p, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v.maximum(vhat)}
