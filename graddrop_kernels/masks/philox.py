"""Philox4x32-10 and the draw layout: which random bits belong to which element. The reference for every backend.

A mask is a pure function of (seed, parameter name, draw, global element index). No generator is consumed and nothing
random is stored, so masks are the same bits on every backend, chunking, thread count and sharding, and after a resume.

    key     = blake2b(name, key=seed)                         64 bits, as two little-endian u32 (k0, k1)
    counter = (q low, q high, draw, domain)                   q = index >> 3: one call serves eight elements
    u16     = word[(index >> 1) & 3] >> (16 * (index & 1))    natural order, low half first

Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
from array import array
from functools import lru_cache
from typing import TypeVar

import torch

MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl key increments of the paper above
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

# Domains keep the streams of one key apart; csrc/philox.h holds the same numbers.
DOMAIN_ELEMENT, DOMAIN_BLOCK, DOMAIN_BUCKET, DOMAIN_GAUSSIAN, DOMAIN_ROUNDING, DOMAIN_MOMENTS = range(6)

_CALLS_PER_PASS = 1 << 16  # int64 temporaries of 0.5 MB stay in the L2 cache: 2.5 times faster than whole tensors


Words = TypeVar("Words", int, torch.Tensor)


@lru_cache(maxsize=4096)  # policies of blocks and of whole parameters ask for theirs in every step
def stream_key(name: str, seed: int) -> int:
    """The 64-bit Philox key of a parameter's or a block's own stream; k0 is its low half, k1 its high half."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def philox4x32_10(c0: Words, c1: Words, c2: Words, c3: Words, key: int) -> tuple[Words, Words, Words, Words]:
    """Ten rounds on one counter (Python ints) or on many at once (int64 tensors holding u32 values);
    returns the four 32-bit words.

    A 32 x 32 bit product overflows int64, but wraps modulo 2^64, so that its two halves come out right all the same.
    """
    k0, k1 = key & MASK32, key >> 32
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (product1 >> 32) & MASK32 ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32) & MASK32 ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
    return c0, c1, c2, c3


def words32(
    key: int, draw: int, domain: int, first: int, count: int, device: torch.device | None = None
) -> torch.Tensor:
    """The raw 32-bit words ``first .. first + count`` of a stream, as an int64 tensor of shape (count,).

    Word i: q = i >> 2, word i & 3.
    """
    words = torch.empty(count, dtype=torch.int64, device=device)
    first_call, last_call = first >> 2, (first + count + 3) >> 2
    for start in range(first_call, last_call, _CALLS_PER_PASS):
        q = torch.arange(start, min(start + _CALLS_PER_PASS, last_call), device=device)
        draw_word, domain_word = torch.full_like(q, draw & MASK32), torch.full_like(q, domain)
        block = torch.stack(philox4x32_10(q & MASK32, q >> 32, draw_word, domain_word, key), dim=1).flatten()
        low, high = max(first, start * 4), min(first + count, start * 4 + block.numel())
        words[low - first : high - first] = block[low - start * 4 : high - start * 4]
    return words


def uniform16(
    key: int, draw: int, domain: int, first: int, count: int, device: torch.device | None = None
) -> torch.Tensor:
    """The 16-bit draws of elements ``first .. first + count``,
    as an int64 tensor of shape (count,) with values in [0, 65535].
    """
    words = words32(key, draw, domain, first >> 1, ((first + count + 1) >> 1) - (first >> 1), device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1).flatten()
    return halves[first & 1 : (first & 1) + count]


def block_uniform64(key: int, draw: int) -> int:
    """The 64-bit draw by which blocks are ordered: word 0 of their own stream, and word 1 above it."""
    low, high, *_ = philox4x32_10(0, 0, draw & MASK32, DOMAIN_BLOCK, key)
    return int(high) << 32 | int(low)


def block_uniform16(key: int, draw: int) -> int:
    """The one 16-bit draw that decides a whole transformer block or parameter: element 0 of its own stream.

    A draw alone takes 12 us in Python, and a step may need one for each of hundreds of parameters. So those of 256
    steps are made at once.
    """
    return _block_draws(key, (draw & MASK32) >> 8)[draw & 0xFF]


@lru_cache(maxsize=4096)  # half a kilobyte each
def _block_draws(key: int, window: int) -> "array[int]":
    draws = torch.arange(window << 8, (window + 1) << 8, device="cpu")
    zero = torch.zeros_like(draws)
    words, *_ = philox4x32_10(zero, zero, draws, zero + DOMAIN_BLOCK, key)
    return array("H", (words & 0xFFFF).tolist())
