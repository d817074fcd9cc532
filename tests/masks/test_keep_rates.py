"""Keep rates and independence of the masks, over a hundred million draws.

A right implementation exceeds each bound with probability < 1e-9.
"""

import functools
import math

import numpy as np
import pytest
import torch

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, LayerGradDrop
from graddrop_kernels.backends import cpu
from graddrop_kernels.masks import philox
from graddrop_kernels.masks.philox import DOMAIN_BUCKET, DOMAIN_ELEMENT, block_uniform16, stream_key

COMPILED = cpu.unavailable() is None
MANY = 100_000_000 if COMPILED else 4_000_000  # the PyTorch generator makes 25 million a second, the kernels 500
SOME = 10_000_000 if COMPILED else 2_000_000
PIECE = 1 << 22
# 6.5 standard deviations: 8e-11 on both sides of a normal estimate; there are fewer than ten of them in a test.
Z = 6.5


def draws(key: int, draw: int = 0, domain: int = DOMAIN_ELEMENT, first: int = 0, count: int = SOME) -> np.ndarray:
    if COMPILED:
        return cpu.uniform16(key, draw, domain, first, count).numpy()
    return philox.uniform16(key, draw, domain, first, count).numpy().astype(np.uint16)


def assert_binomial(hits: int, trials: int, p: float, what: str) -> None:
    """Chernoff: P(trials * KL(hits / trials || p) > x) <= 2 exp(-x), for every p; x = 24 is 7.5e-11."""
    share = hits / trials
    terms = ((share, p), (1 - share, 1 - p))
    divergence = trials * sum(a * math.log(a / b) for a, b in terms if a > 0)
    assert divergence < 24, f"{what}: {hits} of {trials}, {share:.8g} where {p:.8g} is due ({divergence:.1f} nats)"


@functools.lru_cache(maxsize=1)
def histogram(seed: int) -> np.ndarray:
    """How often each of the 65536 draws came up in MANY, from an index past 2^32 on."""
    key, counts = stream_key("encoder.weight", seed), np.zeros(65536, dtype=np.int64)
    for first in range(0, MANY, PIECE):
        counts += np.bincount(draws(key, first=2**32 + first, count=min(PIECE, MANY - first)), minlength=65536)
    return counts


@pytest.mark.parametrize("p", [0.2, 0.9, 1e-4, 1 - 1e-4, 0.5, 1 / 65536])
def test_keep_rate(p, seed):
    """Of the quantised p: 1e-4 is 7 / 65536."""
    threshold, counts = round(p * 65536), histogram(seed)
    assert counts.sum() == MANY
    assert_binomial(int(counts[threshold:].sum()), MANY, 1 - threshold / 65536, f"kept at p = {p}")


def test_every_draw_is_equally_likely(seed):
    """Chi squared with 65535 degrees of freedom, and every bit of a draw."""
    counts, expected = histogram(seed), MANY / 65536
    chi_squared = ((counts - expected) ** 2).sum() / expected
    assert abs(chi_squared - 65535) / math.sqrt(2 * 65535) < Z + 0.5
    values = np.arange(65536)
    for bit in range(16):
        assert_binomial(int(counts[values >> bit & 1 == 1].sum()), MANY, 0.5, f"bit {bit}")


@pytest.mark.parametrize("p", [0.2, 0.9, 1e-4, 1 - 1e-4])
def test_masks_of_the_optimizer_have_the_rate(p, seed):
    """optimizer.mask as drawn, active_fraction as told."""
    count = 3_000_001
    optimizer = FusedGradDropAdamW([("w", torch.nn.Parameter(torch.zeros(count)))], mask=GradDrop(p=p), seed=seed)
    threshold = round(p * 65536)
    kept = int(optimizer.mask("w").sum())
    assert_binomial(kept, count, 1 - threshold / 65536, f"kept at p = {p}")
    assert optimizer.active_fraction() == [1 - threshold / 65536]


@pytest.mark.parametrize("p", [0.2, 0.9])
def test_masks_of_different_streams_are_independent(p, seed):
    """Parameters, steps, seeds, and the buckets' domain: both kept with probability (1 - p)^2."""
    threshold = round(p * 65536)
    streams = {
        "a parameter": (stream_key("layer.0.weight", seed), 0, DOMAIN_ELEMENT),
        "another parameter": (stream_key("layer.1.weight", seed), 0, DOMAIN_ELEMENT),
        "the next step": (stream_key("layer.0.weight", seed), 1, DOMAIN_ELEMENT),
        "a step far on": (stream_key("layer.0.weight", seed), 65536, DOMAIN_ELEMENT),
        "the next seed": (stream_key("layer.0.weight", seed + 1), 0, DOMAIN_ELEMENT),
        "the buckets": (stream_key("layer.0.weight", seed), 0, DOMAIN_BUCKET),
    }
    kept = {what: draws(*stream) >= threshold for what, stream in streams.items()}
    keep = 1 - threshold / 65536
    for i, what in enumerate(kept):
        for other in list(kept)[i + 1 :]:
            assert_binomial(
                int(np.count_nonzero(kept[what] & kept[other])), SOME, keep * keep, f"both {what} and {other}"
            )


@pytest.mark.parametrize("p", [0.2, 0.9])
def test_neighbouring_elements_are_independent(p, seed):
    """Correlation of the keep bits, and of the draws themselves, at lags 1 .. 16 (a Philox call serves 8 elements)
    and of rows of 768 and 1024.
    """
    threshold = round(p * 65536)
    u16 = draws(stream_key("layer.0.weight", seed), 3, first=5)
    keep = 1 - threshold / 65536
    bits = ((u16 >= threshold) - np.float32(keep)) / np.float32(math.sqrt(keep * (1 - keep)))
    level = (u16 - np.float32(32767.5)) / np.float32(65536 / math.sqrt(12))
    for lag in (*range(1, 17), 768, 1024, 65536):
        for what, x in (("keep bits", bits), ("draws", level)):
            correlation = sum(
                float(np.dot(x[i : min(i + PIECE, SOME - lag)], x[i + lag : i + lag + PIECE]))
                for i in range(0, SOME - lag, PIECE)
            )
            assert abs(correlation) / math.sqrt(SOME - lag) < Z, (
                f"{what} at lag {lag}: {correlation / (SOME - lag):.3g}"
            )


def test_elements_are_independent_from_step_to_step(seed):
    """Over 600 steps each element is kept a binomial number of times: mean and spread over the elements."""
    count, steps, p = 20_000, 600, 0.2
    threshold = round(p * 65536)
    key = stream_key("w", seed)
    kept = sum((draws(key, step, count=count) >= threshold).astype(np.int64) for step in range(steps))
    keep = 1 - threshold / 65536
    assert_binomial(int(kept.sum()), count * steps, keep, "kept")
    variance = ((kept - steps * keep) ** 2).mean() / (steps * keep * (1 - keep))
    assert abs(variance - 1) / math.sqrt(2 / count) < Z, f"variance {variance:.4f} of the binomial one"


def test_blocks_are_kept_at_their_rate_independently(seed):
    """Layer-GradDrop: 24 blocks over 4000 steps; pairs of blocks and of steps, too."""
    threshold, blocks, steps = round(0.2 * 65536), 24, 4000
    keys = [stream_key(f"encoder.layer.{i}", seed) for i in range(blocks)]
    kept = np.array([[block_uniform16(key, step) >= threshold for step in range(steps)] for key in keys])
    keep = 1 - threshold / 65536
    assert_binomial(int(kept.sum()), kept.size, keep, "blocks kept")
    assert_binomial(int((kept[1:] & kept[:-1]).sum()), kept[1:].size, keep**2, "neighbouring blocks kept")
    assert_binomial(
        int((kept[:, 1:] & kept[:, :-1]).sum()), kept[:, 1:].size, keep**2, "blocks kept in successive steps"
    )
    named = [(f"encoder.layer.{i}.w", torch.nn.Parameter(torch.zeros(1))) for i in range(blocks)]
    optimizer = FusedGradDropAdamW(named, mask=LayerGradDrop(p=0.2, layers="encoder.layer.*"), seed=seed)
    told = [optimizer.mask(param, step=step).item() for _, param in named for step in range(20)]
    assert told == kept[:, :20].flatten().tolist()


def test_buckets_are_independent_of_the_element_masks(seed):
    """GradDrop-Epoch's half and GradDrop's half of the elements of one parameter: a quarter in both."""
    count = 2_000_000
    named = [("w", torch.nn.Parameter(torch.zeros(count)))]
    half, epoch = (FusedGradDropAdamW(named, mask=mask, seed=seed) for mask in (GradDrop(p=0.5), GradDropEpoch(2)))
    epoch.set_epoch(0)
    assert_binomial(int((half.mask("w") & epoch.mask("w")).sum()), count, 0.25, "both kept")
