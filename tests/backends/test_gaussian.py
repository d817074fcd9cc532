"""Normal numbers from 32-bit words: against the normal distribution, and C++ against PyTorch bit for bit."""

import math

import pytest
import torch
from cases import EXACT, FUSED, assert_same_bits, require

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, backends
from graddrop_kernels.backends import cpu
from graddrop_kernels.backends.batch import Hyper, TensorBatch
from graddrop_kernels.backends.reference.gaussian import normal_from_words
from graddrop_kernels.backends.reference.rounding import EXACT as EXACT_ROUNDING
from graddrop_kernels.backends.reference.rounding import PLAIN as PLAIN_ROUNDING
from graddrop_kernels.masks.philox import DOMAIN_GAUSSIAN, stream_key, words32
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock

COUNT = 1 << 22
ROUNDINGS = pytest.mark.parametrize("rounding", [EXACT_ROUNDING, PLAIN_ROUNDING], ids=["exact", "plain"])


def positive_uniforms(stride: int = 1) -> torch.Tensor:
    """One word for each of the 2^23 values that x > 0 can take, or every stride-th of them with the largest one.

    The word of -x is ~word.
    """
    return torch.arange((1 << 23) - 1, -1, -stride).flip(0) << 8


def true_normal(words: torch.Tensor) -> torch.Tensor:
    """sqrt(2) erfinv(x) in float64, x the odd multiple of 2^-24 that the top 24 bits of a word stand for."""
    top = words >> 8
    x = ((top - ((top >> 23) << 24)).double() + 0.5) / 2**23
    return math.sqrt(2) * torch.special.erfinv(x)


def normal(words: torch.Tensor, rounding) -> torch.Tensor:
    return torch.cat([normal_from_words(part, rounding) for part in words.split(1 << 18)])


@pytest.mark.parametrize("rounding, stride", [(PLAIN_ROUNDING, 1), (EXACT_ROUNDING, 8)], ids=["plain", "exact"])
def test_accuracy(rounding, stride):
    """Against erfinv in float64.

    Measured: at most 3.3e-7 off (2.8 ulp), 7.1e-8 in the mean, alike in the centre and in the tail.
    """
    words = positive_uniforms(stride)
    z, true = normal(words, rounding), true_normal(words)
    error = ((z.double() - true) / true).abs()
    assert error.max() < 4e-7 and error.mean() < 8e-8, f"relative error: {error.max():.3g}, mean {error.mean():.3g}"
    assert 5.4 < z[-1] < 5.42
    assert_same_bits(
        normal(~words[::stride] & 0xFFFFFFFF, rounding), -z[::stride], "the negative half against the positive"
    )


def test_moments_over_every_uniform():
    """E z^2 = 1 - 1.0e-7 and E z^4 = 3 - 5.4e-6 over all 2^23 positive values; their finite number alone gives 1 -
    0.8e-7 and 3 - 5.2e-6.
    """
    z = normal(positive_uniforms(), PLAIN_ROUNDING).double()
    assert abs((z**2).mean() - 1) < 3e-7 and abs((z**4).mean() - 3) < 1e-5, ((z**2).mean() - 1, (z**4).mean() - 3)


@ROUNDINGS
def test_extreme_words(rounding):
    words = torch.tensor([0, 0xFF, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
    z = normal_from_words(words, rounding)
    assert z.dtype == torch.float32 and z.isfinite().all()
    assert z[0] == z[1] == -z[2] and z[3] == -z[4] and 0 < z[0] < 1e-7 and 5.4 < z[3] < 5.42
    assert normal_from_words(torch.empty(0, dtype=torch.int64), rounding).shape == (0,)


def test_distribution(seed):
    """Four million draws of a stream. Every bound is passed by true normal numbers but for a probability below 1e-9."""
    z = normal_from_words(words32(stream_key("w", seed), 0, DOMAIN_GAUSSIAN, 0, COUNT), PLAIN_ROUNDING).double()
    deviations = {  # in standard errors of the estimate over normal numbers
        "mean": z.mean() * math.sqrt(COUNT),
        "variance": ((z**2).mean() - 1) * math.sqrt(COUNT / 2),
        "third moment": (z**3).mean() * math.sqrt(COUNT / 15),
        "kurtosis": ((z**4).mean() - 3) * math.sqrt(COUNT / 96),
        **{f"lag {k}": (z[k:] * z[:-k]).mean() * math.sqrt(COUNT) for k in (1, 2, 3, 4, 5, 8)},
    }
    for bound in (0.5, 1, 2, 3, 4):
        p = math.erfc(bound / math.sqrt(2))
        deviations[f"|z| > {bound}"] = ((z.abs() > bound).double().mean() - p) * math.sqrt(COUNT / (p * (1 - p)))
    assert all(abs(deviation) < 6.8 for deviation in deviations.values()), deviations
    # Kolmogorov-Smirnov: P(D sqrt(n) > 3.4) = 2 exp(-2 3.4^2) = 2e-10
    cdf = torch.special.ndtr(z.sort().values)
    rank = torch.arange(COUNT + 1) / COUNT
    distance = max((rank[1:] - cdf).max(), (cdf - rank[:-1]).max()).item()
    assert distance * math.sqrt(COUNT) < 3.4, f"Kolmogorov-Smirnov distance {distance:.3g}"


def gaussian_factors(engine, key: int, draw: int, base: int, count: int, scale: float) -> torch.Tensor:
    """The factors that a step multiplies gradients by: exp_avg after one step with beta1 = 0 on gradients of 1."""
    zeros = lambda: torch.zeros(count, device=engine.device)
    plan = MaskPlan("gaussian", scale=scale)
    hyper = Hyper(1e-3, 0.0, 0.5, 1e-8, 0.0, False, False, plan)
    batch = TensorBatch(torch.device(engine.device), torch.float32, torch.float32)
    batch.hypers = [hyper]
    batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs = [zeros()], [zeros() + 1], [zeros()], [zeros()]
    batch.max_exp_avg_sqs, batch.steps, batch.keys = [None], [torch.tensor(float(draw), device=engine.device)], [key]
    batch.layouts, batch.mask_words, batch.hyper_rows = [RowBlock(base, count, count)], [None], [0]
    with cpu.using_isa(engine.isa):
        backends.select(engine.backend, torch.device(engine.device), torch.float32, torch.float32).masked_adamw_(batch)
    return batch.exp_avgs[0].cpu()


@pytest.mark.parametrize("base", [0, 1, 2, 3, 2**31 - 4001, 2**33 - 70_001, 2**34 - 333, 2**38 + 5])
def test_fused_factors_are_the_exact_ones(base, seed):
    """N(1, scale^2), scale so large that every bit of z shows: 100 000 numbers, hundreds of them beyond the central
    polynomial.
    """
    require("cpu")
    key, count, scale = stream_key("w", seed), 100_003, 3.0 * 2**20
    z = normal_from_words(words32(key, 5, DOMAIN_GAUSSIAN, base, count), EXACT_ROUNDING)
    assert (z.abs() > 3).any()
    expected = EXACT_ROUNDING.fma(z, torch.tensor(scale), torch.tensor(1.0))
    for engine in (*FUSED, EXACT):
        assert_same_bits(gaussian_factors(engine, key, 5, base, count, scale), expected, f"factors by {engine}")


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
def test_policy_multiplies_by_the_mean_and_variance_of_its_bernoulli_mask(p, seed):
    """GaussianGradDrop(p): factors N(1, p / (1 - p)), new ones every step and parameter; nothing is dropped."""
    count, variance = 1_000_000, round(p * 65536) / (65536 - round(p * 65536))
    named = [(name, torch.nn.Parameter(torch.zeros(count))) for name in ("v", "w")]
    optimizer = FusedGradDropAdamW(named, betas=(0.0, 0.5), mask=GaussianGradDrop(p=p), seed=seed)
    factors = []
    for _ in range(2):
        for _, param in named:
            assert optimizer.mask(param).all()
            param.grad = torch.ones(count)
        optimizer.step()
        factors += [optimizer.state[param]["exp_avg"].double() - 1 for _, param in named]
    for i, factor in enumerate(factors):
        assert abs(factor.mean()) < 6.8 * math.sqrt(variance / count)
        assert abs(factor.square().mean() / variance - 1) < 6.8 * math.sqrt(2 / count)
        for other in factors[:i]:
            assert abs((factor * other).mean() / variance) < 6.8 / math.sqrt(count)
    assert optimizer.active_fraction() == [1.0]
