// Masks of tensors whose elements lie in another order in memory than that of their indices: for each matrix [a, b] of
// the indices memory holds [b, a], as under channels_last. Makes the bits of a mask, or the bit-planes of its buckets,
// in the order of memory. The step reads them as those of a fixed mask.
//
// The draws of eight neighbours share a Philox call. So they are made in the order of indices, for tiles of some rows
// of a matrix, and their bits are transposed 64 x 64 at a time: six steps of shifts for 4096 bits. With AVX-512 the
// draws take half of the 0.4 ns per element.
#pragma once
#include "block_mask.h"

namespace graddrop {
namespace {

constexpr int64_t kColumns = 512;  // of a tile at a time: 64 x 512 bits stay in the first cache

// Transposes: bit j of x[i] becomes bit i of x[j].
template <int kHalf>
GRADDROP_FN void swap_halves(uint64_t* x) {
  constexpr uint64_t kOnes = ~0ull / ((1ull << kHalf) + 1);  // kHalf ones, kHalf zeros, and so on
#pragma GCC unroll 64
  for (int first = 0; first < 64; first += 2 * kHalf)
#pragma GCC unroll 64
    for (int i = first; i < first + kHalf; ++i) {
      const uint64_t swapped = (x[i] >> kHalf ^ x[i + kHalf]) & kOnes;
      x[i] ^= swapped << kHalf;
      x[i + kHalf] ^= swapped;
    }
}
static __attribute__((noinline)) void transpose_64(uint64_t* x) {
  swap_halves<32>(x);
  swap_halves<16>(x);
  swap_halves<8>(x);
  swap_halves<4>(x);
  swap_halves<2>(x);
  swap_halves<1>(x);
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
  uint64_t read_32(int64_t at) const {  // in one load; the bits after the first 57 are undefined
    uint64_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(words) + at / 8, sizeof bits);
    return bits >> (at % 8);
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

// The tiles [begin, end) of a row, see tile_rows(). `planes` are 0 before: num_planes arrays of ceil(numel / 32) words.
static void memory_order_planes(const PreparedRow& row, int64_t a, int64_t b, int num_planes, int64_t begin,
                                int64_t end, uint32_t* planes) {
  constexpr int kMostPlanes = 12;  // of 4096 buckets
  static thread_local Bits bits[kMostPlanes];
  const PhiloxKeys keys = philox_keys(row.mask.key);
  const int64_t rows = tile_rows(b), tiles = (a + rows - 1) / rows, plane_words = (row.tensor.numel + 31) / 32;
  for (; begin < end; ++begin) {
    const int64_t matrix = begin / tiles * a * b, first_row = begin % tiles * rows;
    const int64_t height = std::min(rows, a - first_row);
    for (int64_t column = 0; column < b; column += kColumns) {
      const int64_t width = std::min(kColumns, b - column), first = matrix + first_row * b + column;
      for (int k = 0; k < num_planes; ++k) bits[k].clear(height * width);
      if (width == b) draw_bits(row, keys, num_planes, first, height * width, 0, bits);
      else
        for (int64_t i = 0; i < height; ++i) draw_bits(row, keys, num_planes, first + i * b, width, i * width, bits);
      for (int k = 0; k < num_planes; ++k)
        for (int64_t j = 0; j < width; j += 64) {
          // A square of 64 rows, of which each holds the columns of row i, i + 64, i + 128 ...
          alignas(64) uint64_t square[64] = {};
          const int64_t wide = std::min<int64_t>(64, width - j);
          const uint64_t ones = wide < 64 ? (1ull << wide) - 1 : ~0ull;
          if (wide > 32)
            for (int64_t i = 0; i < height; ++i) square[i] = bits[k].read(i * width + j) & ones;
          else
            for (int64_t above = 0, at = j, shift = 0; above < height; above += 64, shift += wide)
              for (int64_t i = 0; i < std::min<int64_t>(64, height - above); ++i, at += width)
                square[i] |= (bits[k].read_32(at) & ones) << shift;
          transpose_64(square);
          for (int64_t above = 0, next = 0; above < height; above += 64)
            for (int64_t i = 0; i < wide; ++i, ++next)
              set_bits(planes + k * plane_words, matrix + (column + j + i) * a + first_row + above, square[next],
                       std::min<int64_t>(64, height - above), a % 64 == 0);
        }
    }
  }
}

}  // namespace
}  // namespace graddrop
