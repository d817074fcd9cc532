// Masks gradients in place, and does nothing else: for other optimizers.
#pragma once
#include "block_mask.h"

namespace graddrop {
namespace {

// Whole blocks, one after the other. The draws of the next block are made beside the work on this one.
template <Variant kVariant, bool kDrawn, typename G>
GRADDROP_FN void mask_whole_blocks(const PreparedRow& row, const PhiloxKeys& keys, Vec factor, int64_t local,
                                   int64_t global, int64_t blocks) {
  constexpr bool kDraws = kDrawn && selects(kVariant);
  const MaskSpec spec = row.mask;
  PartMask part;
  CallsAhead<1> draws = {static_cast<uint64_t>(global) >> 3, spec.draw, domain_of(spec)};
  if (kDraws) make_first(draws, keys, part.words);
  G* grad = static_cast<G*>(const_cast<void*>(row.tensor.grad)) + local;
  for (int64_t block = 0; block < blocks; ++block, grad += kBlock, local += kBlock, global += kBlock) {
    if (kDraws) {
      mask_from_draws(spec, reinterpret_cast<uint16_t*>(part.words), part.mask);
      start_next(draws);
    } else {
      make_mask<kVariant>(row, keys, local, global, kBlock, part);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i += Vec::kWidth) {
      if (kDraws) advance_next(draws, keys, i / Vec::kWidth, kBlock / Vec::kWidth);
      Lanes keep{};
      if (selects(kVariant)) lanes_at(part.mask.keep, i, keep);
      store(grad + i, masked_gradient<kVariant>(load<Vec>(grad + i), factor, keep, part.mask, i));
    }
    if (kDraws) finish_next(draws, part.words);
  }
}

// Less than a block.
template <Variant kVariant, typename G>
static __attribute__((noinline)) void mask_part(const PreparedRow& row, const PhiloxKeys& keys, Vec factor,
                                                int64_t local, int64_t global, int count) {
  G* grad = static_cast<G*>(const_cast<void*>(row.tensor.grad)) + local;
  G padded[kBlock] = {};
  PartMask part;
  make_mask<kVariant>(row, keys, local, global, count, part);
  std::memcpy(padded, grad, count * sizeof(G));
  for (int i = 0; i < count; i += Vec::kWidth) {
    Lanes keep{};
    if (selects(kVariant)) lanes_at(part.mask.keep, i, keep);
    store(padded + i, masked_gradient<kVariant>(load<Vec>(padded + i), factor, keep, part.mask, i));
  }
  std::memcpy(grad, padded, count * sizeof(G));
}

template <Variant kVariant, typename G>
static __attribute__((noinline)) void mask_gradients_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  const PhiloxKeys keys = philox_keys(row.mask.key);
  const Vec factor(scale_of(row.mask));
  if (!is_drawn<kVariant>(row.mask)) {
    const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
    mask_whole_blocks<kVariant, false, G>(row, keys, factor, begin, 0, blocks);
    if (rest < end) mask_part<kVariant, G>(row, keys, factor, rest, 0, static_cast<int>(end - rest));
    return;
  }
  for_each_part(
      row.tensor, begin, end,
      [&](int64_t local, int64_t global, int64_t blocks) {
        mask_whole_blocks<kVariant, true, G>(row, keys, factor, local, global, blocks);
      },
      [&](int64_t local, int64_t global, int count) {
        mask_part<kVariant, G>(row, keys, factor, local, global, count);
      });
}

template <typename G>
static void mask_gradients_typed(const PreparedRow& row, int64_t begin, int64_t end) {
  G* grad = static_cast<G*>(const_cast<void*>(row.tensor.grad));
  switch (row.mask.kind) {
    case kKeep: return;
    case kOff: std::fill(grad + begin, grad + end, G{}); return;
    case kGaussian: return mask_gradients_variant<kFactor, G>(row, begin, end);
    default: return mask_gradients_variant<kMaskedGradient, G>(row, begin, end);
  }
}

static void mask_gradients(const PreparedRow& row, int64_t begin, int64_t end) {
  switch (row.mode.grad_dtype) {
    case kBFloat16: return mask_gradients_typed<BFloat16>(row, begin, end);
    case kFloat16: return mask_gradients_typed<Float16>(row, begin, end);
    default: return mask_gradients_typed<float>(row, begin, end);
  }
}

}  // namespace
}  // namespace graddrop
