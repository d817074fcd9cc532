// The random numbers of blocks: Philox words, made at once or beside other work, and numbers derived from them. A block
// is 64 elements of one contiguous run. Vec comes from the simd_*.h that was included before. Every function here and
// in the three files that include it has internal linkage, since the instruction sets share the source.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace graddrop {
namespace {

constexpr int kBlock = 64;  // elements

// Philox calls q = first .. first + 7: 32 words, the 16-bit draws of 64 elements, in natural order.
GRADDROP_FN void philox_8_calls(uint64_t first, uint32_t draw, uint32_t domain, const PhiloxKeys& keys,
                                uint32_t* words) {
  Philox8 calls;
  philox_start(calls, first, draw, domain);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) philox_round(calls, keys, round);
  philox_finish(calls, words);
}

// The Philox calls of consecutive blocks, kEights * 8 per block. The calls of the next block are made round by round
// beside the work on this one.
template <int kEights>
struct CallsAhead {
  uint64_t call;  // the first of this block
  uint32_t draw, domain;
  Philox8 next[kEights];
};
// Makes the calls of this block at once, for the first block of a run. Not inlined: it is seldom called.
template <int kEights>
static __attribute__((noinline)) void make_calls(uint64_t call, uint32_t draw, uint32_t domain, const PhiloxKeys& keys,
                                                 uint32_t* words) {
  for (int e = 0; e < kEights; ++e) philox_8_calls(call + 8 * e, draw, domain, keys, words + 32 * e);
}
template <int kEights>
GRADDROP_FN void make_first(const CallsAhead<kEights>& calls, const PhiloxKeys& keys, uint32_t* words) {
  make_calls<kEights>(calls.call, calls.draw, calls.domain, keys, words);
}
template <int kEights>
GRADDROP_FN void start_next(CallsAhead<kEights>& calls) {
  calls.call += 8 * kEights;
#pragma GCC unroll 2
  for (int e = 0; e < kEights; ++e) philox_start(calls.next[e], calls.call + 8 * e, calls.draw, calls.domain);
}
template <int kEights>
GRADDROP_FN void advance_next(CallsAhead<kEights>& calls, const PhiloxKeys& keys, int part, int parts) {
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round)
    if (round * parts / kPhiloxRounds == part)
#pragma GCC unroll 2
      for (int e = 0; e < kEights; ++e) philox_round(calls.next[e], keys, round);
}
template <int kEights>
GRADDROP_FN void finish_next(const CallsAhead<kEights>& calls, uint32_t* words) {
#pragma GCC unroll 2
  for (int e = 0; e < kEights; ++e) philox_finish(calls.next[e], words + 32 * e);
}

// Calls visit(local, global, count) for the contiguous runs of global indices of a row's local elements [begin, end).
template <typename Visit>
GRADDROP_FN void for_each_run(const TensorRow& row, int64_t begin, int64_t end, Visit visit) {
  int64_t line = begin / row.local_inner, column = begin % row.local_inner;
  while (begin < end) {
    const int64_t count = std::min(end - begin, row.local_inner - column);
    visit(begin, row.base + line * row.global_inner + column, count);
    begin += count;
    line += 1;
    column = 0;
  }
}

// The number of elements in the next part of a run, given those left from a global index on. It is at most 64, and the
// part ends at a multiple of 8 in the global index, so that only a run's first part begins in the middle of a Philox
// call.
GRADDROP_FN int64_t part_of(int64_t left, int64_t global) { return std::min<int64_t>(left, kBlock - (global & 7)); }

// Walks the local elements [begin, end) of a row. Calls whole(local, global, blocks) for blocks that begin at a
// multiple of 8 in the global index, and part(local, global, count) for the elements between them.
template <typename Whole, typename Part>
GRADDROP_FN void for_each_part(const TensorRow& row, int64_t begin, int64_t end, Whole whole, Part part) {
  for_each_run(row, begin, end, [&](int64_t local, int64_t global, int64_t left) {
    while (left > 0) {
      int64_t count = part_of(left, global);
      if (count == kBlock) {
        count = left / kBlock * kBlock;
        whole(local, global, left / kBlock);
      } else {
        part(local, global, static_cast<int>(count));
      }
      local += count;
      global += count;
      left -= count;
    }
  });
}

// Random words of 32 bits, four per call, for up to 64 elements from any global index on.
struct Words {
  alignas(64) uint32_t word[kBlock + 32 + 2 * Vec::kWidth];
};
// Makes the words of count elements and returns the first one's. The last vector may read some words after them.
GRADDROP_FN const uint32_t* make_words(uint32_t draw, uint32_t domain, const PhiloxKeys& keys, int64_t global,
                                       int count, Words& words) {
  const int lead = static_cast<int>(global & 3);
  for (int i = 0; i < lead + count; i += 32)
    philox_8_calls((static_cast<uint64_t>(global) >> 2) + i / 4, draw, domain, keys, words.word + i);
  return words.word + lead;
}

// The words of stochastic rounding. One copy of the code, called once per block.
static __attribute__((noinline)) const uint32_t* make_rounding(const PreparedRow& row, Domain domain,
                                                               const PhiloxKeys& keys, int64_t global, int count,
                                                               Words& words) {
  return make_words(row.rounding_draw, domain, keys, global, count, words);
}

// Makes the factors 1 + scale * z of count elements from a global index on, and returns the first one's. Pairs begin at
// even indices; count and the element before are 64 at most, see part_of.
GRADDROP_FN const float* make_factors(const MaskSpec& mask, const PhiloxKeys& keys, int64_t global, int count,
                                      float (&factors)[kBlock]) {
  const int lead = static_cast<int>(global & 1);
  Words words;
  const uint32_t* first = make_words(mask.draw, kDomainGaussian, keys, global - lead, lead + count, words);
  for (int i = 0; i < lead + count; i += 2 * Vec::kWidth) {
    Vec even, odd;
    normal_pair(load_uniforms(first + i), even, odd);
    store_pairs(factors + i, fma(even, Vec(mask.scale), Vec(1.0f)), fma(odd, Vec(mask.scale), Vec(1.0f)));
  }
  return factors + lead;
}

static void uniform16(uint64_t key, uint32_t draw, uint32_t domain, int64_t first, int64_t count, uint16_t* out) {
  alignas(64) uint32_t words[kBlock / 2];
  const PhiloxKeys keys = philox_keys(key);
  while (count > 0) {
    const int64_t lead = first & 7, taken = std::min<int64_t>(count, kBlock - lead);
    philox_8_calls(static_cast<uint64_t>(first) >> 3, draw, domain, keys, words);
    std::memcpy(out, reinterpret_cast<uint16_t*>(words) + lead, taken * sizeof(uint16_t));
    first += taken;
    out += taken;
    count -= taken;
  }
}

}  // namespace
}  // namespace graddrop
