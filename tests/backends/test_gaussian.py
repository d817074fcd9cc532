"""Normal numbers from pairs of 32-bit words: against the normal distribution, and C++ against PyTorch bit for bit."""

import math

import pytest
import torch
from cases import EXACT, FUSED, assert_same_bits, require

from graddrop_kernels import FusedGradDropAdamW, GaussianGradDrop, backends
from graddrop_kernels.backends import cpu
from graddrop_kernels.backends.batch import Hyper, TensorBatch
from graddrop_kernels.backends.reference.gaussian import normals, normals_from_words
from graddrop_kernels.backends.reference.rounding import EXACT as EXACT_ROUNDING
from graddrop_kernels.backends.reference.rounding import PLAIN as PLAIN_ROUNDING
from graddrop_kernels.masks.philox import stream_key
from graddrop_kernels.masks.plan import MaskPlan
from graddrop_kernels.masks.row_block import RowBlock

COUNT = 1 << 22
ROUNDINGS = pytest.mark.parametrize("rounding", [EXACT_ROUNDING, PLAIN_ROUNDING], ids=["exact", "plain"])


def pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.stack((first, second), dim=1).flatten()


def every_radius(stride: int = 1) -> torch.Tensor:
    """A word for each of the 2^23 radii, or every stride-th of them with the largest one, from the smallest on."""
    return torch.arange((1 << 23) - 1, -1, -stride).flip(0) << 9


def every_angle(stride: int = 1) -> torch.Tensor:
    """A word for each of the 2^24 angles, or every stride-th of them."""
    return torch.arange(0, 1 << 24, stride) << 8


def true_pair(words: torch.Tensor) -> torch.Tensor:
    """Box and Muller's numbers in float64: radius sqrt(-2 ln y), angle pi x."""
    first, second = words.view(-1, 2).unbind(1)
    radius = (-2 * torch.log1p(-(first >> 9).double() / 2**23)).sqrt()
    turn = 0.5 - (second >> 8 & 0x7FFFFF).double() / 2**23 + (second >> 31)
    return pairs(radius * torch.cos(math.pi * turn), radius * torch.sin(math.pi * turn))


def normal(words: torch.Tensor, rounding) -> torch.Tensor:
    return torch.cat([normals_from_words(part, rounding) for part in words.split(1 << 18)])


@pytest.mark.parametrize("rounding, stride", [(PLAIN_ROUNDING, 1), (EXACT_ROUNDING, 8)], ids=["plain", "exact"])
def test_accuracy(rounding, stride):
    """Every radius beside some angle, every angle beside some radius and the largest, against float64."""
    radii, angles = every_radius(stride), every_angle(stride)
    for first, second in ((radii, angles[::2]), (radii.repeat(2), angles), (radii[-1:].repeat(2 * len(radii)), angles)):
        words = pairs(first, second)
        error = (normal(words, rounding).double() - true_pair(words)).abs()
        # measured: at most 1.2e-6, 5e-8 in the mean, 2.4e-7 beside the largest radius
        assert error.max() < 1.6e-6 and error.mean() < 3e-7, f"error: {error.max():.3g}, mean {error.mean():.3g}"


def test_moments_over_every_radius_and_angle():
    """E r^2 = 2 and E r^4 = 8 of the radii; E cos^2 = E sin^2 = 1/2, E cos^4 = E sin^4 = 3/8 of the angles."""
    radii, angles = every_radius(4), every_angle(8)
    of_radii = normal(pairs(radii, torch.zeros_like(radii) + (1 << 30)), PLAIN_ROUNDING)[::2].double()  # cos 0 = 1
    assert abs((of_radii**2).mean() - 2) < 2e-5 and abs((of_radii**4).mean() - 8) < 4e-4
    of_angles = normal(pairs(torch.zeros_like(angles) + radii[-1], angles), PLAIN_ROUNDING).double() / of_radii[-1]
    for part in (of_angles[::2], of_angles[1::2]):
        assert abs(part.mean()) < 1e-6 and abs((part**2).mean() - 0.5) < 1e-6 and abs((part**4).mean() - 0.375) < 1e-6


@ROUNDINGS
def test_extreme_words(rounding):
    small, large, ahead, behind = 0, 0xFFFFFFFF, 1 << 30, 3 << 30
    words = torch.tensor([small, ahead, large, ahead, large, behind, large, 0, large, 1 << 31, large, large, 0x1FF, 0])
    z = normals_from_words(words, rounding)
    assert z.dtype == torch.float32 and z.isfinite().all()
    assert (z[:2] == 0).all() and 5.64 < z[2] <= 5.65 and z[2] == -z[4] and z[3] == z[5] == 0
    assert abs(z[6]) < 1e-5 and 5.64 < z[7] <= 5.65 and z[7] == -z[9] and (z[12:] == 0).all()
    assert normals_from_words(torch.empty(0, dtype=torch.int64), rounding).shape == (0,)


@pytest.mark.parametrize("first, count", [(0, 1), (1, 1), (1, 2), (6, 5), (7, 64), (2**33 - 3, 9)])
def test_a_run_may_begin_and_end_within_a_pair(first, count, seed):
    key = stream_key("w", seed)
    around = normals(key, 3, first - first % 8, 80, rounding=EXACT_ROUNDING)
    assert_same_bits(normals(key, 3, first, count, rounding=EXACT_ROUNDING), around[first % 8 :][:count], "the run")


def test_distribution(seed):
    """Four million draws of a stream. Every bound is passed by true normal numbers but for a probability below 1e-9."""
    z = normals(stream_key("w", seed), 0, 0, COUNT, rounding=PLAIN_ROUNDING).double()
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
    """N(1, scale^2), scale so large that every bit of z shows, for 100 000 numbers."""
    require("cpu")
    key, count, scale = stream_key("w", seed), 100_003, 3.0 * 2**20
    z = normals(key, 5, base, count, rounding=EXACT_ROUNDING)
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
