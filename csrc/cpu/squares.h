// The sum of the squares of the gradients, before or after their masks.
#pragma once
#include "block_mask.h"

namespace graddrop {
namespace {

// Element i of a part is added to sum i % 16 for any width of a vector, so that all instruction sets give the same
// bits.
constexpr int kSums = 16;

struct BlockSums {  // in registers
  Squares sums[kSums / Vec::kWidth];
};
template <typename Masked>  // masked(i): vector of elements i .. i + Vec::kWidth
GRADDROP_FN void add_squares(BlockSums& sums, int i, Masked masked) {
#pragma GCC unroll 16
  for (int j = 0; j < kSums; j += Vec::kWidth) add_square(sums.sums[j / Vec::kWidth], masked(i + j));
}

// One vector of gradients after the mask.
template <Variant kVariant, typename G>
GRADDROP_FN Vec masked_vector(const G* grad, Vec factor, const BlockMask& mask, int i) {
  Lanes keep{};
  if (selects(kVariant)) lanes_at(mask.keep, i, keep);
  return masked_gradient<kVariant>(load<Vec>(grad + i), factor, keep, mask, i);
}

// Whole blocks, one after the other. Draws beside the squares take 0.77 of the time of draws before them. Without a
// mask it is as fast as one core reads: 4 bytes per element at 25 GB/s. The update moves its 28 bytes per element at 42
// GB/s, since it writes while it reads. So the norm costs a quarter of an update, not a seventh. Reading at two or four
// places at once, megabytes apart, takes 0.92 of the time; prefetching takes 1.1 and more.
template <Variant kVariant, bool kDrawn, typename G>
GRADDROP_FN void sum_whole_blocks(const PreparedRow& row, const PhiloxKeys& keys, Vec factor, int64_t local,
                                  int64_t global, int64_t blocks, BlockSums& total) {
  constexpr bool kDraws = kDrawn && selects(kVariant);
  const MaskSpec spec = row.mask;
  BlockSums sums = total;
  PartMask part;
  CallsAhead<1> draws = {static_cast<uint64_t>(global) >> 3, spec.draw, domain_of(spec)};
  if (kDraws) make_first(draws, keys, part.words);
  const G* grad = static_cast<const G*>(row.tensor.grad) + local;
  for (int64_t block = 0; block < blocks; ++block, grad += kBlock, local += kBlock, global += kBlock) {
    if (kDraws) {
      mask_from_draws(spec, reinterpret_cast<uint16_t*>(part.words), part.mask);
      start_next(draws);
    } else {
      make_mask<kVariant>(row, keys, local, global, kBlock, part);
    }
    const auto masked_at = [&](int i) __attribute__((always_inline)) {
      return masked_vector<kVariant>(grad, factor, part.mask, i);
    };
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; i += kSums) {
      if (kDraws) advance_next(draws, keys, i / kSums, kBlock / kSums);
      add_squares(sums, i, masked_at);
    }
    if (kDraws) finish_next(draws, part.words);
  }
  total = sums;
}

// Less than a block.
template <Variant kVariant, typename G>
static __attribute__((noinline)) void sum_part(const PreparedRow& row, const PhiloxKeys& keys, Vec factor,
                                               int64_t local, int64_t global, int count, BlockSums& total) {
  G padded[kBlock] = {};
  alignas(64) float masked[kBlock] = {};
  PartMask part;
  make_mask<kVariant>(row, keys, local, global, count, part);
  std::memcpy(padded, static_cast<const G*>(row.tensor.grad) + local, count * sizeof(G));
  for (int i = 0; i < count; i += Vec::kWidth) store(masked + i, masked_vector<kVariant>(padded, factor, part.mask, i));
  for (int i = 0; i < kBlock; i += kSums)
    add_squares(total, i, [&](int j) __attribute__((always_inline)) { return load<Vec>(masked + j); });
}

template <Variant kVariant, typename G>
static __attribute__((noinline)) double sum_of_squares_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  const PhiloxKeys keys = philox_keys(row.mask.key);
  const Vec factor(kVariant == kPlain ? 1.0f : scale_of(row.mask));
  BlockSums sums;
  if (!is_drawn<kVariant>(row.mask)) {
    const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
    sum_whole_blocks<kVariant, false, G>(row, keys, factor, begin, 0, blocks, sums);
    if (rest < end) sum_part<kVariant, G>(row, keys, factor, rest, 0, static_cast<int>(end - rest), sums);
  } else {
    for_each_part(
        row.tensor, begin, end,
        [&](int64_t local, int64_t global, int64_t blocks) {
          sum_whole_blocks<kVariant, true, G>(row, keys, factor, local, global, blocks, sums);
        },
        [&](int64_t local, int64_t global, int count) {
          sum_part<kVariant, G>(row, keys, factor, local, global, count, sums);
        });
  }
  double lanes[kSums], total = 0;
  for (int j = 0; j < kSums; j += Vec::kWidth) store(lanes + j, sums.sums[j / Vec::kWidth]);
  for (double lane : lanes) total += lane;
  return total;
}

template <typename G>
static double sum_of_squares_typed(const PreparedRow& row, bool masked, int64_t begin, int64_t end) {
  if (!masked || row.mask.kind == kKeep || row.mask.masked == kMaskUpdate) return sum_of_squares_variant<kPlain, G>(row, begin, end);
  if (row.mask.kind == kOff) return 0;
  if (row.mask.kind == kGaussian) return sum_of_squares_variant<kFactor, G>(row, begin, end);
  return sum_of_squares_variant<kMaskedGradient, G>(row, begin, end);
}

static double sum_of_squares(const PreparedRow& row, bool masked, int64_t begin, int64_t end) {
  switch (row.mode.grad_dtype) {
    case kBFloat16: return sum_of_squares_typed<BFloat16>(row, masked, begin, end);
    case kFloat16: return sum_of_squares_typed<Float16>(row, masked, begin, end);
    default: return sum_of_squares_typed<float>(row, masked, begin, end);
  }
}

}  // namespace
}  // namespace graddrop
