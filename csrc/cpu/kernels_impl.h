// The chunk loop, for the Vec of whichever simd_*.h was included before. Every function has internal linkage: three instruction sets share this text.
//
// A chunk is up to 256 elements of one contiguous run. It is done in two phases: random words into a buffer in the L1 cache, turned into keep bits;
// then load, update, store. The first phase touches no memory of its own, so the hardware prefetcher sleeps through it: it prefetches the next chunk
// by hand, which overlaps random numbers with memory (one thread, 24M float32 parameters: 2.0 times torch's unmasked step without, 0.97 with).
#pragma once
#include <algorithm>
#include <cstring>

#include "../gaussian.h"
#include "kernels.h"

namespace graddrop {
namespace {

constexpr int kChunk = 256;     // elements; a multiple of 128, the draws of 16 Philox calls
constexpr int kMaxLead = 8;     // a run may begin in the middle of a Philox call
constexpr int kCacheLine = 64;  // bytes

// Keep bits and what else the update needs to know about the elements of a chunk; entry 0 is the chunk's first element.
struct ChunkMask {
  alignas(64) uint32_t words[kChunk + 64];  // random words, then buckets
  alignas(64) uint64_t bits[kChunk / 64];
  alignas(64) float factors[kChunk + 16];   // kGaussian
  const uint16_t* buckets;                  // kBucket with ages
};

// A row's local elements [begin, end) as contiguous runs of global indices: visit(local, global, count).
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

GRADDROP_FN void prefetch(const void* begin, int64_t bytes, int write) {
  const char* line = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += kCacheLine) {
    if (write) __builtin_prefetch(line + i, 1, 3);
    else __builtin_prefetch(line + i, 0, 3);
  }
}

GRADDROP_FN void prefetch_128(const PreparedRow& row, int64_t at) {  // the 128 elements from local index at; past the end does no harm
  const int64_t param_size = row.param_dtype == kFloat32 ? 4 : 2, moment_size = row.moment_dtype == kFloat32 ? 4 : 2;
  prefetch(static_cast<char*>(row.tensor.param) + at * param_size, 128 * param_size, 1);
  prefetch(static_cast<const char*>(row.tensor.grad) + at * param_size, 128 * param_size, 0);
  prefetch(static_cast<char*>(row.tensor.exp_avg) + at * moment_size, 128 * moment_size, 1);
  prefetch(static_cast<char*>(row.tensor.exp_avg_sq) + at * moment_size, 128 * moment_size, 1);
}

// bits [first, first + count) of a bit array of numel bits, beginning at bits[0]; bits past count are undefined.
GRADDROP_FN void copy_bits(const uint32_t* words, int64_t numel, int64_t first, int count, uint64_t* bits) {
  const int64_t num_words = (numel + 31) / 32;
  const int shift = static_cast<int>(first % 32);
  uint32_t* out = reinterpret_cast<uint32_t*>(bits);
  for (int i = 0; i < (count + 31) / 32; ++i) {
    const int64_t word = first / 32 + i;
    uint64_t pair = words[word];
    if (shift && word + 1 < num_words) pair |= static_cast<uint64_t>(words[word + 1]) << 32;
    out[i] = static_cast<uint32_t>(pair >> shift);
  }
}

// bits = first <= bucket <= last, where plane k holds bit k of every bucket: compared bit by bit from the top, 64 elements at once.
GRADDROP_FN void planes_in_range(const uint64_t (*planes)[kChunk / 64], int num_planes, uint32_t first, uint32_t last, int count, uint64_t* bits) {
  for (int i = 0; i < (count + 63) / 64; ++i) {
    uint64_t above_first = 0, equals_first = ~0ull, below_last = 0, equals_last = ~0ull;
    for (int k = num_planes - 1; k >= 0; --k) {
      const uint64_t plane = planes[k][i];
      const uint64_t first_bit = first >> k & 1 ? ~0ull : 0, last_bit = last >> k & 1 ? ~0ull : 0;
      above_first |= equals_first & plane & ~first_bit;
      equals_first &= ~(plane ^ first_bit);
      below_last |= equals_last & ~plane & last_bit;
      equals_last &= ~(plane ^ last_bit);
    }
    bits[i] = (above_first | equals_first) & (below_last | equals_last);
  }
}

GRADDROP_FN void bucket_bits(const PreparedRow& row, int64_t local, int count, ChunkMask& chunk) {
  const MaskSpec& mask = row.mask;
  const int64_t plane_words = (row.tensor.numel + 31) / 32;
  alignas(64) uint64_t planes[12][kChunk / 64];  // 2^12 buckets at most
  for (int k = 0; k < mask.num_planes; ++k) copy_bits(row.tensor.mask_words + k * plane_words, row.tensor.numel, local, count, planes[k]);
  planes_in_range(planes, mask.num_planes, mask.first_bucket, mask.last_bucket, count, chunk.bits);
  if (row.num_ages) {
    uint16_t* buckets = reinterpret_cast<uint16_t*>(chunk.words);
    std::memset(buckets, 0, sizeof(uint16_t) * kChunk);
    for (int k = 0; k < mask.num_planes; ++k) add_plane(planes[k], count, k, buckets);
    chunk.buckets = buckets;
  }
}

// Phase 1: the mask of count elements from local index `local`, whose first global index is `global`; prefetches the chunk after it.
static void make_mask(const PreparedRow& row, int64_t local, int64_t global, int count, ChunkMask& chunk) {
  const MaskSpec& mask = row.mask;
  if (mask.kind == kFixed) {
    for (int i = 0; i < kChunk; i += 128) prefetch_128(row, local + kChunk + i);
    copy_bits(row.tensor.mask_words, row.tensor.numel, local, count, chunk.bits);
    return;
  }
  if (mask.kind == kBucket && mask.num_planes >= 0) {
    for (int i = 0; i < kChunk; i += 128) prefetch_128(row, local + kChunk + i);
    bucket_bits(row, local, count, chunk);
    return;
  }
  if (mask.kind == kGaussian) {  // a 32-bit word an element, four a call
    const int lead = static_cast<int>(global & 3);
    for (int i = 0; i < lead + count; i += 64) {
      if (i % 128 == 0) prefetch_128(row, local + kChunk + i);
      philox_16_calls((static_cast<uint64_t>(global) >> 2) + i / 4, mask.draw, kDomainGaussian, mask.key, chunk.words + i);
    }
    for (int i = 0; i < count; i += Vec::kWidth) {
      const Vec z = normal_from_uniform(symmetric_uniform(chunk.words + lead + i));
      store(chunk.factors + i, fma(z, Vec(mask.scale), Vec(1.0f)));
    }
    return;
  }
  // 16 bits an element, eight a call
  const int lead = static_cast<int>(global & 7);
  const uint32_t domain = mask.kind == kBucket ? kDomainBucket : kDomainElement;
  for (int i = 0; i < lead + count; i += 128) {
    prefetch_128(row, local + kChunk + i);
    philox_16_calls((static_cast<uint64_t>(global) >> 3) + i / 8, mask.draw, domain, mask.key, chunk.words + i / 2);
  }
  uint16_t* u16 = reinterpret_cast<uint16_t*>(chunk.words) + lead;
  if (mask.kind == kBucket) {
    to_buckets(u16, count, mask.buckets);
    in_range(u16, count, static_cast<uint16_t>(mask.first_bucket), static_cast<uint16_t>(mask.last_bucket - mask.first_bucket), chunk.bits);
    chunk.buckets = u16;
  } else {
    in_range(u16, count, static_cast<uint16_t>(mask.threshold), static_cast<uint16_t>(65535 - mask.threshold), chunk.bits);
  }
}

// What an update does with the mask; one instance of the update loop each.
enum Variant { kPlain, kZeroGradient, kMaskedGradient, kFactor, kFrozen, kFrozenByAge };

// Phase 2 on one vector: elements i .. i + Vec::kWidth of the chunk, at the given addresses.
template <Variant kVariant, typename P, typename M>
GRADDROP_FN void update_lanes(const PreparedRow& row, const AdamWScalars<Vec>& scalars, const ChunkMask& chunk, int i, P* param, const P* grad, M* exp_avg,
                              M* exp_avg_sq, M* max_exp_avg_sq) {
  constexpr bool kSelect = kVariant == kMaskedGradient || kVariant == kFrozen || kVariant == kFrozenByAge;
  Lanes keep{};
  if (kSelect) keep = lanes_at(chunk.bits, i);
  AdamWElement<Vec> e;
  e.param = load(param);
  e.exp_avg = load(exp_avg);
  e.exp_avg_sq = load(exp_avg_sq);
  e.max_exp_avg_sq = row.amsgrad ? load(max_exp_avg_sq) : e.exp_avg_sq;

  Vec g(0.0f);
  if (kVariant == kPlain) g = load(grad) * Vec(row.sign);
  if (kVariant == kFactor) g = load(grad) * Vec(row.sign) * load(chunk.factors + i);
  if (kSelect) g = keep_or_zero(keep, load(grad) * Vec(row.sign * row.mask.scale));

  if (kVariant == kFrozenByAge) {
    AdamWScalars<Vec> aged = scalars;
    aged.step_size = lookup(row.step_sizes, row.num_ages, chunk.buckets + i);
    aged.bias_correction2_sqrt = lookup(row.bias_corrections2_sqrt, row.num_ages, chunk.buckets + i);
    adamw_update(e, g, aged, row.decay, row.amsgrad);
  } else {
    adamw_update(e, g, scalars, row.decay, row.amsgrad);
  }

  if (kVariant == kFrozen || kVariant == kFrozenByAge) {
    store_kept(param, keep, e.param);
    store_kept(exp_avg, keep, e.exp_avg);
    store_kept(exp_avg_sq, keep, e.exp_avg_sq);
    if (row.amsgrad) store_kept(max_exp_avg_sq, keep, e.max_exp_avg_sq);
  } else {
    store(param, e.param);
    store(exp_avg, e.exp_avg);
    store(exp_avg_sq, e.exp_avg_sq);
    if (row.amsgrad) store(max_exp_avg_sq, e.max_exp_avg_sq);
  }
}

// Phase 2: the chunk's elements in vectors, the last few through copies on the stack.
template <Variant kVariant, typename P, typename M>
GRADDROP_FN void update_chunk(const PreparedRow& row, const AdamWScalars<Vec>& scalars, const ChunkMask& chunk, int64_t local, int count) {
  P* param = static_cast<P*>(row.tensor.param) + local;
  const P* grad = static_cast<const P*>(row.tensor.grad) + local;
  M* exp_avg = static_cast<M*>(row.tensor.exp_avg) + local;
  M* exp_avg_sq = static_cast<M*>(row.tensor.exp_avg_sq) + local;
  M* max_exp_avg_sq = row.amsgrad ? static_cast<M*>(row.tensor.max_exp_avg_sq) + local : exp_avg_sq;
  int i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth)
    update_lanes<kVariant>(row, scalars, chunk, i, param + i, grad + i, exp_avg + i, exp_avg_sq + i, max_exp_avg_sq + i);
  if (i == count) return;
  const size_t rest = count - i;
  P params[Vec::kWidth] = {}, grads[Vec::kWidth] = {};
  M exp_avgs[Vec::kWidth] = {}, exp_avg_sqs[Vec::kWidth] = {}, max_exp_avg_sqs[Vec::kWidth] = {};
  std::memcpy(params, param + i, rest * sizeof(P));
  if (kVariant != kZeroGradient) std::memcpy(grads, grad + i, rest * sizeof(P));
  std::memcpy(exp_avgs, exp_avg + i, rest * sizeof(M));
  std::memcpy(exp_avg_sqs, exp_avg_sq + i, rest * sizeof(M));
  std::memcpy(max_exp_avg_sqs, max_exp_avg_sq + i, rest * sizeof(M));
  update_lanes<kVariant>(row, scalars, chunk, i, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs);
  std::memcpy(param + i, params, rest * sizeof(P));
  std::memcpy(exp_avg + i, exp_avgs, rest * sizeof(M));
  std::memcpy(exp_avg_sq + i, exp_avg_sqs, rest * sizeof(M));
  if (row.amsgrad) std::memcpy(max_exp_avg_sq + i, max_exp_avg_sqs, rest * sizeof(M));
}

template <Variant kVariant, typename P, typename M>
static void masked_adamw_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  const AdamWScalars<float>& s = row.scalars;
  const AdamWScalars<Vec> scalars = {Vec(s.neg_lr_weight_decay), Vec(s.beta1), Vec(s.neg_beta1), Vec(s.beta2), Vec(s.neg_beta2),
                                     Vec(s.step_size), Vec(s.bias_correction2_sqrt), Vec(s.eps)};
  ChunkMask chunk;
  if (kVariant == kPlain || kVariant == kZeroGradient) {  // nothing random: the layout does not matter
    for (int64_t at = begin; at < end; at += kChunk)
      update_chunk<kVariant, P, M>(row, scalars, chunk, at, static_cast<int>(std::min<int64_t>(kChunk, end - at)));
    return;
  }
  for_each_run(row.tensor, begin, end, [&](int64_t local, int64_t global, int64_t left) {
    while (left > 0) {
      // Up to a multiple of 8 in the global index, so that only a run's first chunk begins in the middle of a Philox call.
      const int count = static_cast<int>(std::min<int64_t>(left, kChunk - (global & 7)));
      make_mask(row, local, global, count, chunk);
      update_chunk<kVariant, P, M>(row, scalars, chunk, local, count);
      local += count;
      global += count;
      left -= count;
    }
  });
}

template <typename P, typename M>
static void masked_adamw_typed(const PreparedRow& row, int64_t begin, int64_t end) {
  switch (row.mask.kind) {
    case kKeep: return masked_adamw_variant<kPlain, P, M>(row, begin, end);
    case kOff: return row.mask.frozen ? void() : masked_adamw_variant<kZeroGradient, P, M>(row, begin, end);
    case kGaussian: return masked_adamw_variant<kFactor, P, M>(row, begin, end);
    default:
      if (!row.mask.frozen) return masked_adamw_variant<kMaskedGradient, P, M>(row, begin, end);
      if (row.num_ages) return masked_adamw_variant<kFrozenByAge, P, M>(row, begin, end);
      return masked_adamw_variant<kFrozen, P, M>(row, begin, end);
  }
}

static void masked_adamw(const PreparedRow& row, int64_t begin, int64_t end) {
  const bool wide_moments = row.moment_dtype == kFloat32;
  switch (row.param_dtype) {
    case kFloat32: return masked_adamw_typed<float, float>(row, begin, end);
    case kBFloat16: return (wide_moments ? masked_adamw_typed<BFloat16, float> : masked_adamw_typed<BFloat16, BFloat16>)(row, begin, end);
    case kFloat16: return (wide_moments ? masked_adamw_typed<Float16, float> : masked_adamw_typed<Float16, Float16>)(row, begin, end);
  }
}

static void uniform16(uint64_t key, uint32_t draw, uint32_t domain, int64_t first, int64_t count, uint16_t* out) {
  alignas(64) uint32_t words[64];
  while (count > 0) {
    const int64_t lead = first & 7, taken = std::min<int64_t>(count, 128 - lead);
    philox_16_calls(static_cast<uint64_t>(first) >> 3, draw, domain, key, words);
    std::memcpy(out, reinterpret_cast<uint16_t*>(words) + lead, taken * sizeof(uint16_t));
    first += taken;
    out += taken;
    count -= taken;
  }
}

static void bucket_planes(const TensorRow& row, uint32_t buckets, int num_planes, int64_t begin, int64_t end, uint32_t* planes) {
  const int64_t plane_words = (row.numel + 31) / 32;
  uint16_t u16[kChunk];
  for (; begin < end; begin += kChunk) {
    const int64_t stop = std::min(begin + kChunk, end);
    for_each_run(row, begin, stop, [&](int64_t local, int64_t global, int64_t count) {
      uniform16(row.key, 0, kDomainBucket, global, count, u16 + (local - begin));
    });
    for (int k = 0; k < num_planes; ++k)
      for (int64_t word = begin; word < stop; word += 32) {
        uint32_t bits = 0;
        for (int64_t i = word; i < std::min(word + 32, stop); ++i) bits |= (bucket_of(u16[i - begin], buckets) >> k & 1) << (i - word);
        planes[k * plane_words + word / 32] = bits;
      }
  }
}

}  // namespace
}  // namespace graddrop
