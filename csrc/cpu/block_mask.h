// The mask of a block, from draws, bit-planes or the bits of a fixed mask, or as factors. Applies it to gradients.
#pragma once
#include "draws.h"

namespace graddrop {
namespace {

template <typename V, typename T>
GRADDROP_FN V load(const T* source) {
  V value;
  load(source, value);
  return value;
}

// The mask of a block as its update needs it. Entry 0 is the block's first element.
struct BlockMask {
  Keep keep;
  const uint16_t* buckets = nullptr;  // of each element, to look up its age
  const float* factors = nullptr;     // kGaussian
  const uint32_t* rounding = nullptr;  // random words: stochastic rounding of parameters
  const uint32_t* rounding_moments = nullptr;
};

// The ways in which an update uses the mask. There is one instance of the update loop per way.
enum Variant { kPlain, kZeroGradient, kMaskedGradient, kFactor, kFrozen, kFrozenByAge, kMaskedUpdate };

constexpr bool freezes_moments(Variant variant) { return variant == kFrozen || variant == kFrozenByAge; }
constexpr bool freezes_param(Variant variant) { return freezes_moments(variant) || variant == kMaskedUpdate; }
constexpr bool selects(Variant variant) {
  return variant == kMaskedGradient || freezes_param(variant);
}
constexpr bool masks_gradient(Variant variant) { return selects(variant) && variant != kMaskedUpdate; }

// Bits [first, first + 64) of a bit array of numel bits. Bits past its end are undefined.
GRADDROP_FN uint64_t bits_at(const uint32_t* words, int64_t numel, int64_t first) {
  const int64_t num_words = (numel + 31) / 32, word = first / 32;
  const int shift = static_cast<int>(first % 32);
  uint64_t bits = words[word] >> shift;
  if (word + 1 < num_words) bits |= static_cast<uint64_t>(words[word + 1]) << (32 - shift);
  if (shift && word + 2 < num_words) bits |= static_cast<uint64_t>(words[word + 2]) << (64 - shift);
  return bits;
}

// The mask of a block from bit-planes. first <= bucket <= last is compared bit by bit from the top, 64 elements at
// once.
GRADDROP_FN void mask_from_planes(const PreparedRow& row, int64_t local, uint16_t* buckets, BlockMask& block) {
  const MaskSpec& mask = row.mask;
  const int64_t numel = row.tensor.numel, plane_words = (numel + 31) / 32;
  uint64_t above_first = 0, equals_first = ~0ull, below_last = 0, equals_last = ~0ull;
  if (row.num_ages) std::memset(buckets, 0, kBlock * sizeof(uint16_t));
  for (int k = mask.num_planes - 1; k >= 0; --k) {
    const uint64_t plane = bits_at(row.tensor.mask_words + k * plane_words, numel, local);
    const uint64_t first_bit = mask.first_bucket >> k & 1 ? ~0ull : 0, last_bit = mask.last_bucket >> k & 1 ? ~0ull : 0;
    above_first |= equals_first & plane & ~first_bit;
    equals_first &= ~(plane ^ first_bit);
    below_last |= equals_last & ~plane & last_bit;
    equals_last &= ~(plane ^ last_bit);
    if (row.num_ages) add_plane(plane, k, buckets);
  }
  keep_bits((above_first | equals_first) & (below_last | equals_last), block.keep);
  block.buckets = buckets;
}

// The mask of a block from its 16-bit draws, which become buckets in place.
GRADDROP_FN void mask_from_draws(const MaskSpec& mask, uint16_t* u16, BlockMask& block) {
  if (mask.kind != kBucket) return keep_at_least(u16, static_cast<uint16_t>(mask.threshold), block.keep);
  to_buckets(u16, mask.buckets);
  keep_in_range(u16, static_cast<uint16_t>(mask.first_bucket), static_cast<uint16_t>(mask.last_bucket), block.keep);
  block.buckets = u16;
}

GRADDROP_FN uint32_t domain_of(const MaskSpec& mask) { return mask.kind == kBucket ? kDomainBucket : kDomainElement; }

GRADDROP_FN float scale_of(const MaskSpec& mask) {  // of kept gradients
  return mask.kind == kBernoulli || mask.kind == kFixed ? mask.scale : 1.0f;
}

// The mask of up to 64 elements, and the memory that it needs.
struct PartMask {
  BlockMask mask;
  alignas(64) uint32_t words[kBlock];
  alignas(64) float factors[kBlock];
};
template <Variant kVariant>
GRADDROP_FN void make_mask(const PreparedRow& row, const PhiloxKeys& keys, int64_t local, int64_t global, int count,
                           PartMask& part) {
  uint16_t* u16 = reinterpret_cast<uint16_t*>(part.words);
  if (kVariant == kFactor) {
    part.mask.factors = make_factors(row.mask, keys, global, count, part.factors);
  } else if (kVariant == kMaskedUpdate && row.mask.kind == kOff) {
    keep_bits(0, part.mask.keep);
  } else if (selects(kVariant) && row.mask.kind == kFixed) {
    keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), part.mask.keep);
  } else if (selects(kVariant) && row.mask.kind == kBucket && row.mask.num_planes >= 0) {
    mask_from_planes(row, local, u16, part.mask);
  } else if (selects(kVariant)) {
    // Draws begin at a whole call. The first `lead` = global & 7 of them belong to the elements before;
    // lead + count <= 64, see part_of.
    philox_8_calls(static_cast<uint64_t>(global) >> 3, row.mask.draw, domain_of(row.mask), keys, part.words);
    mask_from_draws(row.mask, u16 + (global & 7), part.mask);
  }
}

// Whether a row's masks depend on the positions of its elements in the whole parameter.
template <Variant kVariant>
GRADDROP_FN bool is_drawn(const MaskSpec& mask) {
  return kVariant == kFactor ||
         (selects(kVariant) && (mask.kind == kBernoulli || (mask.kind == kBucket && mask.num_planes < 0)));
}

// Masks and scales a vector of gradients.
template <Variant kVariant, typename V>
GRADDROP_FN V masked_gradient(V g, V factor, const typename V::LaneMask& keep, const BlockMask& mask, int i) {
  g = kVariant == kZeroGradient ? V(0.0f) : g * factor;
  if (kVariant == kFactor) g = g * load<V>(mask.factors + i);
  if (masks_gradient(kVariant)) g = keep_or_zero(keep, g);
  return g;
}

static void bucket_planes(const TensorRow& row, uint32_t buckets, int num_planes, int64_t begin, int64_t end,
                          uint32_t* planes) {
  const int64_t plane_words = (row.numel + 31) / 32;
  uint16_t u16[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t stop = std::min(begin + kBlock, end);
    for_each_run(row, begin, stop, [&](int64_t local, int64_t global, int64_t count) {
      uniform16(row.key, 0, kDomainBucket, global, count, u16 + (local - begin));
    });
    for (int k = 0; k < num_planes; ++k)
      for (int64_t word = begin; word < stop; word += 32) {
        uint32_t bits = 0;
        for (int64_t i = word; i < std::min(word + 32, stop); ++i)
          bits |= (bucket_of(u16[i - begin], buckets) >> k & 1) << (i - word);
        planes[k * plane_words + word / 32] = bits;
      }
  }
}

}  // namespace
}  // namespace graddrop
