// Masks of tensors whose elements lie in another order in memory than that of their indices: for each matrix [a, b] of
// the indices memory holds [b, a], as under channels_last. Makes the bits of a mask, or the bit-planes of its buckets, in
// the order of memory. The step reads them as those of a fixed mask.
//
// The draws of eight neighbours share a Philox call, so they are made in the order of indices, for tiles of 64 rows of a
// matrix, and their bits are transposed 64 x 64 at a time: six steps of shifts for 4096 bits.
#pragma once
#include "block_mask.h"

namespace graddrop {
namespace {

constexpr int64_t kColumns = 512;  // of a tile at a time: 64 x 512 bits stay in the first cache

// Transposes: bit j of x[i] becomes bit i of x[j].
GRADDROP_FN void transpose_64(uint64_t* x) {
  uint64_t ones = 0x00000000ffffffffull;
  for (int half = 32; half; half >>= 1, ones ^= ones << half)
    for (int first = 0; first < 64; first += 2 * half)
      for (int i = first; i < first + half; ++i) {
        const uint64_t swapped = (x[i] >> half ^ x[i + half]) & ones;
        x[i] ^= swapped << half;
        x[i + half] ^= swapped;
      }
}

// A string of bits: 64 are added or read at any place.
struct Bits {
  uint64_t words[kBlock * kColumns / 64 + 2];

  void clear(int64_t count) { std::memset(words, 0, (count / 64 + 2) * sizeof(uint64_t)); }
  void add(int64_t at, uint64_t bits) {
    const int shift = static_cast<int>(at % 64);
    words[at / 64] |= bits << shift;
    if (shift) words[at / 64 + 1] |= bits >> (64 - shift);
  }
  uint64_t read(int64_t at) const {
    const int shift = static_cast<int>(at % 64);
    return words[at / 64] >> shift | (shift ? words[at / 64 + 1] << (64 - shift) : 0);
  }
};

// Draws the elements with the indices first .. first + count, and adds their bits to each plane from ``at`` on.
GRADDROP_FN void draw_bits(const PreparedRow& row, const PhiloxKeys& keys, int num_planes, int64_t first, int64_t count,
                           int64_t at, Bits* planes) {
  alignas(64) uint32_t words[kBlock];
  alignas(64) uint16_t single[kBlock];
  while (count > 0) {
    const int64_t lead = first & 7, taken = std::min<int64_t>(count, kBlock - lead);
    philox_8_calls(static_cast<uint64_t>(first) >> 3, row.mask.draw, domain_of(row.mask), keys, words);
    uint16_t* u16 = reinterpret_cast<uint16_t*>(words) + lead;  // the elements after the last count for nothing
    const uint64_t ones = taken < 64 ? (1ull << taken) - 1 : ~0ull;
    Keep keep;
    if (row.mask.kind != kBucket) {
      keep_at_least(u16, static_cast<uint16_t>(row.mask.threshold), keep);
      planes[0].add(at, bits_of(keep) & ones);
    } else {
      to_buckets(u16, row.mask.buckets);
      for (int k = 0; k < num_planes; ++k) {
        for (int i = 0; i < kBlock; ++i) single[i] = u16[i] >> k & 1;
        keep_at_least(single, 1, keep);
        planes[k].add(at, bits_of(keep) & ones);
      }
    }
    first += taken;
    at += taken;
    count -= taken;
  }
}

// Sets `count` bits of a bit array that is 0 before, from bit `at` on. Threads share its words unless `alone`.
GRADDROP_FN void set_bits(uint32_t* words, int64_t at, uint64_t bits, int64_t count, bool alone) {
  words += at / 32;
  const int shift = static_cast<int>(at % 32);
  if (alone) return static_cast<void>(std::memcpy(words, &bits, sizeof bits));
  const uint32_t parts[3] = {static_cast<uint32_t>(bits << shift), static_cast<uint32_t>(bits >> (32 - shift)),
                             shift ? static_cast<uint32_t>(bits >> (64 - shift)) : 0};
  for (int i = 0; i * 32 < shift + count; ++i)
    if (parts[i]) __atomic_fetch_or(words + i, parts[i], __ATOMIC_RELAXED);
}

// The tiles [begin, end) of a row, each 64 rows of one of its matrices [a, b]. `planes` are 0 before: num_planes arrays of
// ceil(numel / 32) words.
static void memory_order_planes(const PreparedRow& row, int64_t a, int64_t b, int num_planes, int64_t begin, int64_t end,
                                uint32_t* planes) {
  constexpr int kMostPlanes = 12;  // of 4096 buckets
  static thread_local Bits bits[kMostPlanes];
  const PhiloxKeys keys = philox_keys(row.mask.key);
  const int64_t tiles = (a + 63) / 64, plane_words = (row.tensor.numel + 31) / 32;
  for (; begin < end; ++begin) {
    const int64_t matrix = begin / tiles * a * b, first_row = begin % tiles * 64, height = std::min<int64_t>(64, a - first_row);
    for (int64_t column = 0; column < b; column += kColumns) {
      const int64_t width = std::min(kColumns, b - column), first = matrix + first_row * b + column;
      for (int k = 0; k < num_planes; ++k) bits[k].clear(height * width);
      if (width == b) draw_bits(row, keys, num_planes, first, height * width, 0, bits);
      else
        for (int64_t i = 0; i < height; ++i) draw_bits(row, keys, num_planes, first + i * b, width, i * width, bits);
      for (int k = 0; k < num_planes; ++k)
        for (int64_t j = 0; j < width; j += 64) {
          uint64_t square[64] = {};
          for (int64_t i = 0; i < height; ++i) square[i] = bits[k].read(i * width + j);
          transpose_64(square);
          for (int64_t i = 0; i < std::min<int64_t>(64, width - j); ++i)
            set_bits(planes + k * plane_words, matrix + (column + j + i) * a + first_row, square[i], height, a % 64 == 0);
        }
    }
  }
}

}  // namespace
}  // namespace graddrop
