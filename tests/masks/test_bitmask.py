"""Bit-packed masks and bucket planes at every tail length: PyTorch against Python ints, C++ against PyTorch."""

import random

import numpy as np
import pytest
import torch
from cases import assert_same_bits

from graddrop_kernels.backends import cpu
from graddrop_kernels.masks import bitmask
from graddrop_kernels.masks.philox import DOMAIN_BUCKET, stream_key, uniform16
from graddrop_kernels.masks.row_block import RowBlock

LENGTHS = (*range(71), 127, 128, 129, 255, 257, 1000, 4095, 4097, 10_007)
BUCKETS = (1, 2, 3, 5, 8, 9, 64, 65, 1000, 4095, 4096)


def random_bits(length: int, seed: int) -> torch.Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(seed + length)) < 0.6


@pytest.mark.parametrize("length", LENGTHS)
def test_pack_is_least_significant_bit_first_with_a_zero_tail(length, seed):
    bits = random_bits(length, seed)
    words = bitmask.pack(bits)
    assert words.dtype == torch.int32 and words.shape == (bitmask.num_words(length),) == (-(-length // 32),)
    as_one_number = sum(int(bit) << i for i, bit in enumerate(bits.tolist()))
    expected = [as_one_number >> 32 * i & 0xFFFFFFFF for i in range(len(words))]
    assert [word & 0xFFFFFFFF for word in words.tolist()] == expected
    assert_same_bits(bitmask.unpack(words, length), bits)


def test_pack_of_all_ones_and_of_other_shapes(seed):
    assert bitmask.pack(torch.ones(64, dtype=torch.bool)).tolist() == [-1, -1]
    assert bitmask.pack(torch.ones(33, dtype=torch.uint8)).tolist() == [-1, 1]
    bits = random_bits(77 * 5, seed).view(77, 5)
    assert_same_bits(bitmask.pack(bits), bitmask.pack(bits.flatten()))
    assert_same_bits(
        bitmask.pack(bits.t()), bitmask.pack(bits.t().contiguous()), "contiguous order, whatever the strides"
    )


class NotPlain(torch.Tensor):
    """Packed by PyTorch's operations, as on a GPU."""


@pytest.mark.parametrize("kind", [torch.Tensor, NotPlain])
def test_pack_agrees_with_numpy_on_many(kind, seed):
    for length in (0, 1, 32, *random.Random(seed).sample(range(100_000), 5)):
        bits = random_bits(length, seed)
        expected = np.packbits(np.pad(bits.numpy(), (0, -length % 32)), bitorder="little").view("<i4")
        words = bitmask.pack(bits.as_subclass(kind)).as_subclass(torch.Tensor)
        assert_same_bits(words, torch.from_numpy(expected.astype(np.int32)))


def test_num_planes():
    assert [bitmask.num_planes(buckets) for buckets in (1, 2, 3, 4, 5, 8, 9, 64, 65, 4095, 4096)] == [
        0,
        1,
        2,
        2,
        3,
        3,
        4,
        6,
        7,
        12,
        12,
    ]


@pytest.mark.parametrize("buckets", BUCKETS)
def test_planes_to_buckets_inverts_pack_buckets(buckets, seed):
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(seed + length)
        bucket = torch.randint(buckets, (length,), generator=generator)
        planes = bitmask.pack_buckets(bucket, buckets)
        assert planes.shape == (bitmask.num_planes(buckets), bitmask.num_words(length)) and planes.dtype == torch.int32
        assert_same_bits(bitmask.planes_to_buckets(planes, length), bucket, f"{length} elements")
        for k, plane in enumerate(planes):
            assert_same_bits(bitmask.unpack(plane, length), (bucket >> k & 1).bool(), f"plane {k} of {length} elements")
            if length % 32:
                assert plane[-1].item() & 0xFFFFFFFF < 1 << length % 32, (
                    f"the tail of plane {k} of {length} elements is not zero"
                )


@pytest.mark.parametrize("buckets", BUCKETS)
def test_element_buckets(buckets, seed):
    """bucket = (u16 * T) >> 16, draw 0 of the bucket domain; every bucket occurs and none besides."""
    key, count = stream_key("w", seed), 200_000
    bucket = bitmask.element_buckets(key, buckets, 5, count)
    u16 = uniform16(key, 0, DOMAIN_BUCKET, 5, count).tolist()
    assert bucket.tolist() == [u * buckets // 65536 for u in u16]
    assert bucket.unique().numel() == buckets  # a bucket of 4096 stays empty with probability 4096 exp(-48.8) = 3e-18


@pytest.mark.parametrize("buckets", BUCKETS)
def test_cpp_bucket_planes_are_the_torch_ones(buckets, seed, isa):
    key = stream_key("w", seed)
    for length in LENGTHS:
        drawn = bitmask.element_buckets(key, buckets, 0, length)
        compiled = cpu.bucket_planes(key, buckets, RowBlock.whole(length), length)
        assert_same_bits(compiled, bitmask.pack_buckets(drawn, buckets), f"planes of {length} elements")
        assert_same_bits(bitmask.planes_to_buckets(compiled, length), drawn, f"buckets of {length} elements")


@pytest.mark.parametrize("first", [1, 2**31 - 5, 2**33 + 3, 2**35 - 9, 2**38 + 1])
def test_cpp_bucket_planes_of_a_range(first, seed, isa):
    """A contiguous shard: from a global index past 32 bits, and longer than a thread's unit of work."""
    key, length = stream_key("w", seed), 9001
    compiled = cpu.bucket_planes(key, 7, RowBlock(first, length, length), length)
    assert_same_bits(compiled, bitmask.pack_buckets(bitmask.element_buckets(key, 7, first, length), 7))
