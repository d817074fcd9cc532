"""Philox and the draw layout: known answers, PyTorch against C++, and the specification once more in plain Python."""

import hashlib
import random
import struct

import numpy as np
import pytest
import torch
from cases import assert_same_bits, require

from graddrop_kernels import FusedGradDropAdamW, LayerGradDrop
from graddrop_kernels.backends import cpu
from graddrop_kernels.masks import philox

# Random123, tests/kat_vectors: counter, key, output of philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
known_answers = pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)


def key_of(halves) -> int:
    return halves[0] | halves[1] << 32


def spec_key(name: str, seed: int) -> int:
    """The key as the specification has it: BLAKE2b, 8 bytes, keyed by the seed; two little-endian u32, k0 the low
    half.
    """
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8, key=struct.pack("<Q", seed)).digest()
    return key_of(struct.unpack("<II", digest))


def spec_words(key: int, c0: int, c1: int, c2: int, c3: int) -> list[int]:
    """Philox4x32-10 after the paper, in Python ints."""
    counter, k0, k1 = [c0, c1, c2, c3], key % 2**32, key // 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ k0, low1, high0 ^ counter[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return counter


def spec_u16(key: int, draw: int, domain: int, i: int) -> int:
    """The 16-bit draw of element i, eight elements a call."""
    word = spec_words(key, (i >> 3) % 2**32, i >> 35, draw, domain)[(i >> 1) & 3]
    return word >> (16 * (i & 1)) & 0xFFFF


@known_answers
def test_known_answers_python(counter, key, output):
    assert philox.philox4x32_10(*counter, key_of(key)) == output
    assert tuple(spec_words(key_of(key), *counter)) == output


@known_answers
def test_known_answers_torch(counter, key, output):
    words = philox.philox4x32_10(*(torch.tensor([word, word]) for word in counter), key_of(key))
    assert [word.tolist() for word in words] == [[word, word] for word in output]


@known_answers
def test_known_answers_cpp(counter, key, output):
    require("cpu")
    counters = torch.tensor([counter], dtype=torch.uint32)
    words = cpu.philox(counters, torch.from_numpy(np.array([key_of(key)], dtype=np.uint64)))
    assert words.tolist() == [list(output)]


def test_million_random_counters_torch_against_cpp(seed):
    require("cpu")
    rng = np.random.default_rng(seed)
    rounds, rows = 16, 1 << 16  # one key a call of the PyTorch form
    counters = rng.integers(0, 2**32, (rounds, rows, 4), dtype=np.uint32)
    keys = rng.integers(0, 2**64, rounds, dtype=np.uint64)
    for counter, key in zip(counters, keys):
        compiled = cpu.philox(torch.from_numpy(counter), torch.full((rows,), int(key), dtype=torch.uint64))
        words = philox.philox4x32_10(*torch.from_numpy(counter.astype(np.int64)).unbind(1), int(key))
        assert_same_bits(
            torch.from_numpy(compiled.numpy().astype(np.int64)), torch.stack(words, 1), f"words under key {key:#x}"
        )
    # and a key of its own for every counter, in Python ints
    keys = rng.integers(0, 2**64, 1000, dtype=np.uint64)
    compiled = cpu.philox(torch.from_numpy(counters[0, :1000].copy()), torch.from_numpy(keys)).tolist()
    assert compiled == [spec_words(int(key), *map(int, counter)) for key, counter in zip(keys, counters[0])]


# Around each place where an index, a call number or a counter word outgrows 31 or 32 bits.
EDGES = [0, 1, 5, 8, 2**31 - 700, 2**32 - 3, 2**33 - 333, 2**34 - 11, 2**35 - 501, 2**38 - 77, 2**38 + 12345, 2**50 + 7]


@pytest.mark.parametrize("first", EDGES)
def test_uniform16_torch_is_the_specification(first, seed):
    key, draw = spec_key("encoder.weight", seed), random.Random(seed + first).getrandbits(32)
    for domain in range(5):
        drawn = philox.uniform16(key, draw, domain, first, 1009)
        assert drawn.dtype == torch.int64 and drawn.shape == (1009,)
        positions = [*range(20), *range(980, 1009), *random.Random(seed).sample(range(1009), 50)]
        assert drawn[positions].tolist() == [spec_u16(key, draw, domain, first + i) for i in positions]


@pytest.mark.parametrize("first", EDGES)
def test_uniform16_cpp_is_torch(first, seed, isa):
    key, draw = spec_key("encoder.weight", seed), random.Random(seed - first).getrandbits(32)
    for domain in range(5):
        for count in (0, 1, 7, 9, 127, 129, 1500):
            compiled = cpu.uniform16(key, draw, domain, first, count).to(torch.int64)
            assert_same_bits(
                compiled, philox.uniform16(key, draw, domain, first, count), f"domain {domain}, {count} from {first}"
            )


def test_uniform16_long_range(seed, isa):
    """Longer than a unit of work and than a pass of the PyTorch form, from an odd start."""
    key, first, count = spec_key("w", seed), 2**33 - 600_001, 1_200_003
    assert_same_bits(cpu.uniform16(key, 3, 0, first, count).to(torch.int64), philox.uniform16(key, 3, 0, first, count))


def test_words32_is_the_specification(seed):
    key, first = spec_key("w", seed), 2**34 - 13
    expected = [spec_words(key, (i >> 2) % 2**32, i >> 34, 9, 3)[i & 3] for i in range(first, first + 50)]
    assert philox.words32(key, 9, 3, first, 50).tolist() == expected


def test_pieces_of_a_stream_fit_together(seed):
    """The draws of a range do not depend on where it was cut."""
    key = spec_key("w", seed)
    whole = philox.uniform16(key, 1, 0, 3, 300)
    cuts = [0, *sorted(random.Random(seed).sample(range(1, 300), 20)), 300]
    pieces = [philox.uniform16(key, 1, 0, 3 + low, high - low) for low, high in zip(cuts, cuts[1:])]
    assert_same_bits(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    "name", ["weight", "roberta.encoder.layer.3.attention.self.query.weight", "0.0", "couche.é.重み", ""]
)
@pytest.mark.parametrize("key_seed", [0, 1, 0x0123456789ABCDEF, 2**64 - 1])
def test_stream_key_is_keyed_blake2b(name, key_seed):
    assert philox.stream_key(name, key_seed) == spec_key(name, key_seed)


def test_stream_key_low_half_is_k0():
    """Written as numbers once, so that a change of the byte order or of the hash cannot go unnoticed."""
    assert philox.stream_key("encoder.layer.0.weight", 7) == 0x1D0208E4A628A900


def test_draws_domains_and_keys_are_separate_streams(seed):
    """Two independent streams agree in one of 65536 draws: 2^19 draws agree 8 times in the mean, more than 45 times
    with probability 1e-18.
    """
    key, count = spec_key("w", seed), 1 << 19
    streams = {f"domain {domain}, draw {draw}": (key, draw, domain) for domain in range(5) for draw in (0, 1)}
    streams |= {"draw 2^16": (key, 2**16, 0), "draw 2^31": (key, 2**31, 0), "seed + 1": (spec_key("w", seed + 1), 0, 0)}
    streams |= {"name": (spec_key("v", seed), 0, 0)}
    drawn = {what: philox.uniform16(*stream, 0, count) for what, stream in streams.items()}
    for what in drawn:
        for other in drawn:
            same = int((drawn[what] == drawn[other]).sum())
            assert same == count if what == other else same <= 45, (
                f"{what} and {other} agree in {same} of {count} draws"
            )


def test_domain_numbers_are_the_specification():
    domains = (
        philox.DOMAIN_ELEMENT,
        philox.DOMAIN_BLOCK,
        philox.DOMAIN_BUCKET,
        philox.DOMAIN_GAUSSIAN,
        philox.DOMAIN_ROUNDING,
    )
    assert domains == (0, 1, 2, 3, 4)


def test_block_draw(seed):
    for draw in (0, 1, 1000, 2**32 - 1):
        key = spec_key("encoder.layer.3", seed)
        assert philox.block_uniform16(key, draw) == spec_u16(key, draw, 1, 0)


def test_blocks_are_kept_by_their_own_name_and_the_groups_steps(seed):
    names = [f"encoder.layer.{i}.{part}" for i in range(6) for part in ("weight", "bias")]
    named = [(name, torch.nn.Parameter(torch.zeros(3))) for name in names]
    optimizer = FusedGradDropAdamW(named, mask=LayerGradDrop(p=0.4, layers="encoder.layer.*"), seed=seed)
    threshold = round(0.4 * 65536)
    for step in range(40):
        for name, param in named:
            block = name.rsplit(".", 1)[0]
            keep = spec_u16(spec_key(block, seed), step, 1, 0) >= threshold
            assert optimizer.mask(param).tolist() == [keep] * 3, f"{name} at step {step}"
            param.grad = torch.ones(3)
        optimizer.step()
