// The masks of the eight elements that a thread updates in one turn, and of one element of any layout. Applies them to
// gradients.
//
// The 16-bit draws of eight elements are one Philox call. If all tensors are 16-bit, a thread's eight elements are
// neighbours, and the thread makes its own call. With float32 tensors they are two groups of four, 128 elements apart,
// so that the 32 lanes of a warp read 512 contiguous bytes with each load. Lanes 2k and 2k + 1 then share call k in
// their first groups and call 16 + k in their second ones. Each makes one of the two calls, and they exchange halves.
#pragma once
#include "../gaussian.h"
#include "../mask.h"
#include "../tensor_table.h"

// For long functions: inlined on the device, out of line on the host, where inlining would make the build slow.
#if defined(__CUDA_ARCH__)
#define GRADDROP_LONG_FN GRADDROP_FN
#else
#define GRADDROP_LONG_FN static __host__ __device__
#endif

namespace graddrop {

constexpr int kWarp = 32;
constexpr int kElements = 8;  // per thread and turn
constexpr int kWarpElements = kWarp * kElements;

// The ways in which a launch masks, with one instance of the kernel each. Buckets and bits freeze by their rows' flags.
enum Variant : int32_t {
  kPlain, kFactor, kDraws, kDrawsFrozen, kBuckets, kBucketsByAge, kBits, kBitsByAge,
  kDrawsUpdate, kBucketsUpdate, kBitsUpdate,  // kMaskUpdate
};

GRADDROP_FN constexpr bool draws_buckets(Variant v) { return v == kBuckets || v == kBucketsByAge || v == kBucketsUpdate; }
GRADDROP_FN constexpr bool draws_elements(Variant v) { return v == kDraws || v == kDrawsFrozen || v == kDrawsUpdate; }
GRADDROP_FN constexpr bool draws(Variant v) { return draws_elements(v) || draws_buckets(v); }
GRADDROP_FN constexpr bool reads_bits(Variant v) { return v == kBits || v == kBitsByAge || v == kBitsUpdate; }
GRADDROP_FN constexpr bool selects(Variant v) { return draws(v) || reads_bits(v); }
GRADDROP_FN constexpr bool of_update(Variant v) { return v >= kDrawsUpdate; }
GRADDROP_FN constexpr bool freezes(Variant v) { return selects(v) && v != kDraws; }  // at least the parameter
GRADDROP_FN constexpr bool by_age(Variant v) { return v == kBucketsByAge || v == kBitsByAge; }
GRADDROP_FN constexpr int32_t kind_of(Variant v) {
  return v == kPlain ? kKeep : v == kFactor ? kGaussian : draws_elements(v) ? kBernoulli : kBucket;
}

GRADDROP_FN uint64_t global_index(const TensorRow& row, int64_t i) {
  if (row.numel <= row.local_inner) return static_cast<uint64_t>(row.base + i);  // saves a 64-bit division
  return static_cast<uint64_t>(row.base + i / row.local_inner * row.global_inner + i % row.local_inner);
}

// The position of a lane in an aligned row, where eight elements from a multiple of eight on share one Philox call.
struct Turn {
  int64_t first;  // local index of the warp's first element
  int left;       // elements from there to the end of the tensor, or of the chunk
  int lane;
};

struct ThreadMask {  // fields that a variant does not use are never computed
  bool keep[kElements];
  uint32_t bucket[kElements];
  float factor[kElements];
};

// The first element of a lane's group, counted from the warp's first.
template <int kVector>
GRADDROP_FN int group_offset(int lane, int group) {
  return group * kWarp * kVector + lane * kVector;
}

// The draws of a lane's eight elements. All lanes of a warp must call it together.
template <int kVector>
GRADDROP_LONG_FN PhiloxWords lane_draws(const TensorRow& row, const Turn& turn, uint32_t draw, uint32_t domain) {
  const int64_t first_groups = turn.first + turn.lane * kVector / kElements * kElements;
  if (kVector == kElements) return philox_call(global_index(row, first_groups) / 8, draw, domain, row.key);
  const int64_t second_groups = first_groups + kWarp * kVector;
  const bool odd = turn.lane & 1;
  const int64_t mine = odd ? second_groups : first_groups;
  const PhiloxWords own = philox_call(global_index(row, mine) / 8, draw, domain, row.key);
#if defined(__CUDA_ARCH__)
  const uint32_t low = __shfl_xor_sync(0xffffffffu, odd ? own.word[0] : own.word[2], 1);
  const uint32_t high = __shfl_xor_sync(0xffffffffu, odd ? own.word[1] : own.word[3], 1);
#else
  const int64_t others = odd ? first_groups : second_groups;
  const PhiloxWords theirs = philox_call(global_index(row, others) / 8, draw, domain, row.key);
  const uint32_t low = theirs.word[odd ? 2 : 0], high = theirs.word[odd ? 3 : 1];
#endif
  if (odd) return {{low, high, own.word[2], own.word[3]}};
  return {{own.word[0], own.word[1], low, high}};
}

// The bits of a lane's elements. A group never straddles two words.
template <int kVector>
GRADDROP_FN uint32_t lane_bits(const Turn& turn, const uint32_t* words) {
  uint32_t bits = 0;
#pragma unroll
  for (int group = 0; group < kElements / kVector; ++group) {
    const int offset = group_offset<kVector>(turn.lane, group);
    if (offset + kVector <= turn.left)
      bits |= (words[offset / 32] >> offset % 32 & ((1u << kVector) - 1)) << group * kVector;
  }
  return bits;
}

GRADDROP_FN int planes_of(uint32_t buckets) {  // ceil(log2 buckets)
#if defined(__CUDA_ARCH__)
  return 32 - __clz(static_cast<int>(buckets - 1));
#else
  return buckets > 1 ? 32 - __builtin_clz(buckets - 1) : 0;
#endif
}

// Finds which of up to 32 elements have first <= bucket <= last. Compares bit by bit from the top plane, all at once.
struct BucketRange {
  uint32_t above_first = 0, equals_first = ~0u, below_last = 0, equals_last = ~0u;
};
GRADDROP_FN void add_plane(BucketRange& range, uint32_t bits, uint32_t first, uint32_t last, int plane) {
  const uint32_t first_bit = 0u - (first >> plane & 1), last_bit = 0u - (last >> plane & 1);
  range.above_first |= range.equals_first & bits & ~first_bit;
  range.equals_first &= ~(bits ^ first_bit);
  range.below_last |= range.equals_last & ~bits & last_bit;
  range.equals_last &= ~(bits ^ last_bit);
}
GRADDROP_FN uint32_t in_range(const BucketRange& range) {
  return (range.above_first | range.equals_first) & (range.below_last | range.equals_last);
}

template <Variant kVariant, int kVector>
GRADDROP_LONG_FN void mask_from_bits(const TensorRow& row, const StepRow& step, const Turn& turn, ThreadMask& mask) {
  const uint32_t* const words = row.mask_words + turn.first / 32;
  const int64_t plane_words = (row.numel + 31) / 32;
  BucketRange range;
#pragma unroll
  for (int e = 0; e < kElements; ++e) mask.bucket[e] = 0;
#pragma unroll 1
  for (int k = planes_of(step.buckets) - 1; k >= 0; --k) {
    const uint32_t bits = lane_bits<kVector>(turn, words + k * plane_words);
    add_plane(range, bits, step.first_bucket, step.last_bucket, k);
    if (by_age(kVariant)) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) mask.bucket[e] |= (bits >> e & 1) << k;
    }
  }
  const uint32_t keep = step.first_bucket <= step.last_bucket ? in_range(range) : 0;  // a dropped row has no range
#pragma unroll
  for (int e = 0; e < kElements; ++e) mask.keep[e] = keep >> e & 1;
}

template <Variant kVariant, int kVector>
GRADDROP_LONG_FN void make_mask(const TensorRow& row, const StepRow& step, const Turn& turn, ThreadMask& mask) {
  if (draws(kVariant)) {
    const uint32_t domain = draws_buckets(kVariant) ? kDomainBucket : kDomainElement;
    const PhiloxWords words = lane_draws<kVector>(row, turn, step.draw, domain);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const uint32_t u16 = uniform16(words, e);
      if (draws_buckets(kVariant)) {
        mask.bucket[e] = bucket_of(u16, step.buckets);
        mask.keep[e] = step.first_bucket <= mask.bucket[e] && mask.bucket[e] <= step.last_bucket;
      } else {
        mask.keep[e] = u16 >= step.threshold;
      }
    }
  }
  if (reads_bits(kVariant)) mask_from_bits<kVariant, kVector>(row, step, turn, mask);
  if (kVariant == kFactor) {
#pragma unroll
    for (int four = 0; four < kElements; four += 4) {  // 32 bits per element: a call makes four
      const int64_t i = turn.first + group_offset<kVector>(turn.lane, four / kVector) + four % kVector;
      const PhiloxWords words = philox_call(global_index(row, i) / 4, step.draw, kDomainGaussian, row.key);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float even, odd;
        normal_pair(uniforms(words.word[i], words.word[i + 1]), even, odd);
        mask.factor[four + i] = fma(even, step.deviation, 1.0f);
        mask.factor[four + i + 1] = fma(odd, step.deviation, 1.0f);
      }
    }
  }
}

// Element e's gradient, masked, scaled and signed. It is selected, not multiplied: a dropped inf or NaN is dropped.
template <Variant kVariant>
GRADDROP_FN float masked_gradient(float g, const StepRow& step, const ThreadMask& mask, int e) {
  g *= step.factor;
  if (kVariant == kFactor) g *= mask.factor[e];
  return !selects(kVariant) || of_update(kVariant) || mask.keep[e] ? g : 0.0f;
}

// The mask of local element i of any row. It makes one Philox call per element.
struct ElementMask {
  bool keep;
  uint32_t bucket;
  float factor;
};

GRADDROP_FN uint32_t word_at(const PhiloxWords& words, uint64_t i) {  // registers have no index
  const uint32_t low = i & 1 ? words.word[1] : words.word[0], high = i & 1 ? words.word[3] : words.word[2];
  return i & 2 ? high : low;
}
GRADDROP_FN uint32_t draw_of(uint64_t index, uint32_t draw, uint32_t domain, uint64_t key) {
  return word_at(philox_call(index / 8, draw, domain, key), index / 2) >> (16 * (index & 1)) & 0xffffu;
}
GRADDROP_FN uint32_t bucket_from_planes(const TensorRow& row, uint32_t buckets, int64_t i) {
  uint32_t bucket = 0;
  for (int k = planes_of(buckets) - 1; k >= 0; --k)
    bucket |= (row.mask_words[k * ((row.numel + 31) / 32) + i / 32] >> i % 32 & 1) << k;
  return bucket;
}

GRADDROP_LONG_FN ElementMask element_mask(int32_t kind, bool planes, const TensorRow& row, const StepRow& step, int64_t i) {
  ElementMask mask = {true, 0, 1.0f};
  const uint64_t index = global_index(row, i);
  if (kind == kBernoulli) {
    mask.keep = draw_of(index, step.draw, kDomainElement, row.key) >= step.threshold;
  } else if (kind == kGaussian) {
    const PhiloxWords words = philox_call(index / 4, step.draw, kDomainGaussian, row.key);
    float even, odd;
    normal_pair(uniforms(word_at(words, index & ~1ull), word_at(words, index | 1)), even, odd);
    mask.factor = fma(index & 1 ? odd : even, step.deviation, 1.0f);
  } else if (kind == kBucket || kind == kFixed) {
    mask.bucket = kind == kFixed || planes ? bucket_from_planes(row, step.buckets, i)
                                           : bucket_of(draw_of(index, 0, kDomainBucket, row.key), step.buckets);
    mask.keep = step.first_bucket <= mask.bucket && mask.bucket <= step.last_bucket;
  }
  if (step.flags & kOffFlag) mask.keep = false;
  return mask;
}

GRADDROP_FN float masked_gradient(float g, const StepRow& step, const ElementMask& mask, bool update) {
  return mask.keep || update ? g * step.factor * mask.factor : 0.0f;
}

}  // namespace graddrop
