"""Bit-packed masks: 1 bit per element, 32 elements per int32 word, least significant bit first, zero tail.

A bucket number (GradDropEpoch) is stored as ceil(log2 T) such bit-planes. Plane k holds bit k of every element's
bucket.
"""

import numpy as np
import torch

from .philox import DOMAIN_BUCKET, uniform16
from .row_block import RowBlock

_WORDS_AT_ONCE = 1 << 18  # for counting bits: 8 MB of single bits


def num_words(numel: int) -> int:
    """The number of int32 words that hold one bit per element."""
    return (numel + 31) // 32


def num_planes(buckets: int) -> int:
    """The number of bit-planes for a bucket number in [0, buckets): ceil(log2 buckets), so 0 for a single bucket."""
    return (buckets - 1).bit_length()


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bool or 0/1 tensor of any shape -> int32 tensor of shape (ceil(numel / 32),), in contiguous element order."""
    if type(bits) is torch.Tensor and bits.device.type == "cpu":  # by NumPy, 50 times faster
        packed = np.zeros(4 * num_words(bits.numel()), np.uint8)
        of_bits = np.packbits(bits.detach().reshape(-1).bool().numpy(), bitorder="little")
        packed[: len(of_bits)] = of_bits
        return torch.from_numpy(packed.view("<i4"))
    bits = bits.reshape(-1).to(torch.int64)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 32)).view(-1, 32)
    words = (padded << torch.arange(32, device=bits.device)).sum(dim=1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # u32 -> the int32 of the same bits


def unpack(words: torch.Tensor, numel: int) -> torch.Tensor:
    """int32 words -> bool tensor of shape (numel,)."""
    bits = (words.to(torch.int64).unsqueeze(1) >> torch.arange(32, device=words.device)) & 1
    return bits.flatten()[:numel].bool()


def bits_of_layout(words: torch.Tensor, layout: RowBlock, numel: int) -> torch.Tensor:
    """The bits of a layout's elements in local order, taken from the bits of the whole parameter: int32 words."""
    if layout == RowBlock.whole(numel) and words.numel() == num_words(numel):
        return words
    if not numel:
        return words[:0]
    first, last = layout.base // 32, (max(first + count for _, first, count in layout.runs(numel)) + 31) // 32
    bits = unpack(words[first:last], 32 * (last - first))
    return pack(torch.cat([bits[start - 32 * first :][:count] for _, start, count in layout.runs(numel)]))


def count_kept(words: torch.Tensor) -> int:
    """The number of set bits of a packed mask, whose bits after the last element are 0."""
    parts = words.cpu().split(_WORDS_AT_ONCE)
    return sum(int(np.unpackbits(part.numpy().view(np.uint8)).sum(dtype=np.int64)) for part in parts)


def element_buckets(key: int, buckets: int, first: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """Each element's bucket in [0, buckets), drawn once for the whole training: int64 tensor of shape (count,).

    GradDrop-Epoch needs no sort or permutation for this. Every element has exactly one bucket, and bucket sizes are
    binomial around 1/buckets.
    """
    return (uniform16(key, 0, DOMAIN_BUCKET, first, count, device) * buckets) >> 16


def pack_buckets(bucket: torch.Tensor, buckets: int) -> torch.Tensor:
    """Bucket numbers in [0, buckets), shape (numel,) -> bit-planes:
    int32 tensor of shape (num_planes(buckets), num_words(numel)).
    """
    planes = [pack((bucket >> k) & 1) for k in range(num_planes(buckets))]
    return (
        torch.stack(planes)
        if planes
        else torch.empty(0, num_words(bucket.numel()), dtype=torch.int32, device=bucket.device)
    )


def planes_to_buckets(planes: torch.Tensor, numel: int) -> torch.Tensor:
    """Bit-planes -> int64 tensor of bucket numbers, shape (numel,)."""
    buckets = torch.zeros(numel, dtype=torch.int64, device=planes.device)
    for k in range(planes.size(0)):
        buckets += unpack(planes[k], numel).long() << k
    return buckets
