// The block loop, for the Vec and Vec2 of whichever simd_*.h was included before. Every function has internal linkage:
// three instruction sets share this text.
//
// A block is 64 elements of one contiguous run: eight Philox calls. For every vector of a block the loop does three
// independent pieces of work: some rounds of the random numbers of the next block, the moments of this vector, and the
// parameters of the vector kLag before, whose square roots are then ready. Done one after the other, each waits for its
// own square root, division or chain of multiplications; in this order the memory, the divider and the integer units
// work at the same time.
// Measured (Zen 4, one thread, 24M float32, ratio to torch's unmasked fused step): random numbers for 256 elements
// first and then their update 1.20, with software prefetch 1.54, whole blocks of the three in turn 1.00 to 1.10; vector
// by vector (this order) takes 0.97 of that with AVX-512 and 0.93 with AVX2, from the cache.
#pragma once
#include <algorithm>
#include <cstring>

#include "../gaussian.h"
#include "kernels.h"

namespace graddrop {
namespace {

constexpr int kBlock = 64;  // elements

template <typename V, typename T>
GRADDROP_FN V load(const T* source) {
  V value;
  load(source, value);
  return value;
}

// Philox calls q = first .. first + 7: 32 words, the 16-bit draws of 64 elements, in natural order.
GRADDROP_FN void philox_8_calls(uint64_t first, uint32_t draw, uint32_t domain, const PhiloxKeys& keys,
                                uint32_t* words) {
  Philox8 calls;
  philox_start(calls, first, draw, domain);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) philox_round(calls, keys, round);
  philox_finish(calls, words);
}

// What a block's update needs to know of its mask; entry 0 is the block's first element.
struct BlockMask {
  Keep keep;
  const uint16_t* buckets = nullptr;  // of each element, for the ages
  const float* factors = nullptr;     // kGaussian
};

// What an update does with the mask; one instance of the update loop each.
enum Variant { kPlain, kZeroGradient, kMaskedGradient, kFactor, kFrozen, kFrozenByAge };

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

// Bits [first, first + 64) of a bit array of numel bits; those past its end are undefined.
GRADDROP_FN uint64_t bits_at(const uint32_t* words, int64_t numel, int64_t first) {
  const int64_t num_words = (numel + 31) / 32, word = first / 32;
  const int shift = static_cast<int>(first % 32);
  uint64_t bits = words[word] >> shift;
  if (word + 1 < num_words) bits |= static_cast<uint64_t>(words[word + 1]) << (32 - shift);
  if (shift && word + 2 < num_words) bits |= static_cast<uint64_t>(words[word + 2]) << (64 - shift);
  return bits;
}

// The mask of a block of bit-planes: first <= bucket <= last, compared bit by bit from the top, 64 elements at once.
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

// What all vectors of a row share, to be kept in registers: copy it into the loop that uses it,
// so that no store can alias it.
template <typename V>
struct Update {
  AdamWScalars<V> scalars;
  V factor;  // sign, times the scale of kept gradients
  AgeTables by_age;
  int64_t num_ages;
  V grad_scale;
  bool decay, amsgrad, unscale;
};
template <typename V>
GRADDROP_FN Update<V> make_update(const PreparedRow& row) {
  const AdamWScalars<float>& s = row.scalars;
  const float scale = row.mask.kind == kBernoulli || row.mask.kind == kFixed ? row.mask.scale : 1.0f;
  return {{V(s.lr_weight_decay), V(s.beta1), V(s.beta2), V(s.step_size), V(s.bias_correction2_sqrt),
           V(s.bias_correction2_sqrt_reciprocal), V(s.eps)},
          V(row.sign * scale),
          row.by_age,
          row.num_ages,
          V(row.grad_scale ? *row.grad_scale : 1.0f),
          row.decay,
          row.amsgrad,
          row.grad_scale != nullptr};
}

// The tensors of a row from one local index on.
template <typename P, typename M>
struct Streams {
  P *param, *grad;
  M *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
};
template <typename P, typename M>
GRADDROP_FN Streams<P, M> streams_at(const PreparedRow& row, int64_t local) {
  const TensorRow& t = row.tensor;
  return {static_cast<P*>(t.param) + local, static_cast<P*>(const_cast<void*>(t.grad)) + local, static_cast<M*>(t.exp_avg) + local,
          static_cast<M*>(t.exp_avg_sq) + local,
          static_cast<M*>(row.amsgrad ? t.max_exp_avg_sq : t.exp_avg_sq) + local};
}

constexpr bool selects(Variant variant) {
  return variant == kMaskedGradient || variant == kFrozen || variant == kFrozenByAge;
}
constexpr bool freezes(Variant variant) { return variant == kFrozen || variant == kFrozenByAge; }

template <Variant kVariant, typename T, typename V>
GRADDROP_FN void store_result(T* target, const typename V::LaneMask& keep, V value) {
  if (freezes(kVariant)) store_kept(target, keep, value);
  else store(target, value);
}

// The moments of one vector, elements i .. i + V::kWidth of a block.
template <Variant kVariant, typename V, typename P, typename M>
GRADDROP_FN AdamWDirection<V> update_moments(const Update<V>& u, const BlockMask& mask, int i, const Streams<P, M>& s) {
  typename V::LaneMask keep{};
  if (selects(kVariant)) lanes_at(mask.keep, i, keep);
  V g(0.0f);
  if (kVariant != kZeroGradient || u.unscale) g = load<V>(s.grad + i);
  if (u.unscale) {
    g = div(g, u.grad_scale);
    store(s.grad + i, g);
  }
  g = kVariant == kZeroGradient ? V(0.0f) : g * u.factor;
  if (kVariant == kFactor) g = g * load<V>(mask.factors + i);
  if (selects(kVariant)) g = keep_or_zero(keep, g);

  AdamWScalars<V> scalars = u.scalars;
  if (kVariant == kFrozenByAge) lookup(u.by_age.step_size, u.num_ages, mask.buckets + i, scalars.step_size);
  AdamWElement<V> e;
  e.exp_avg = load<V>(s.exp_avg + i);
  e.exp_avg_sq = load<V>(s.exp_avg_sq + i);
  e.max_exp_avg_sq = u.amsgrad ? load<V>(s.max_exp_avg_sq + i) : e.exp_avg_sq;
  const AdamWDirection<V> direction = adamw_moments(e, g, scalars, u.amsgrad);
  store_result<kVariant>(s.exp_avg + i, keep, e.exp_avg);
  store_result<kVariant>(s.exp_avg_sq + i, keep, e.exp_avg_sq);
  if (u.amsgrad) store_result<kVariant>(s.max_exp_avg_sq + i, keep, e.max_exp_avg_sq);
  return direction;
}

// The parameters of one vector.
template <Variant kVariant, typename V, typename P>
GRADDROP_FN void update_param(const Update<V>& u, const BlockMask& mask, int i, P* param,
                              const AdamWDirection<V>& direction) {
  typename V::LaneMask keep{};
  if (freezes(kVariant)) lanes_at(mask.keep, i, keep);
  AdamWScalars<V> scalars = u.scalars;
  if (kVariant == kFrozenByAge) {
    lookup(u.by_age.bias_correction2_sqrt, u.num_ages, mask.buckets + i, scalars.bias_correction2_sqrt);
    lookup(u.by_age.bias_correction2_sqrt_reciprocal, u.num_ages, mask.buckets + i,
           scalars.bias_correction2_sqrt_reciprocal);
  }
  store_result<kVariant>(param + i, keep, adamw_param(load<V>(param + i), direction, scalars, u.decay));
}

// Vectors whose moments are done and whose parameters are not: the last kLag of the block before.
constexpr int kLag = 2;
template <typename V, typename P>
struct Pending {
  P* param = nullptr;  // of the block before
  const BlockMask* mask = nullptr;
  AdamWDirection<V> direction[kLag];
};

template <Variant kVariant, typename V, typename P>
GRADDROP_FN void finish(const Update<V>& u, const Pending<V, P>& pending) {
  if (!pending.param) return;
#pragma GCC unroll 8
  for (int j = 0; j < kLag; ++j)
    update_param<kVariant>(u, *pending.mask, kBlock + (j - kLag) * V::kWidth, pending.param, pending.direction[j]);
}

// The moments of a whole block, and the parameters of its vectors kLag later, so that their square roots are ready.
template <Variant kVariant, typename V, typename P, typename M, typename Between>
GRADDROP_FN void update_block(const Update<V>& u, const BlockMask& mask, const Streams<P, M>& s, Pending<V, P>& pending,
                              Between between) {
  constexpr int kVectors = kBlock / V::kWidth;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    between(j, kVectors);
    const AdamWDirection<V> direction = update_moments<kVariant>(u, mask, j * V::kWidth, s);
    AdamWDirection<V>& before = pending.direction[j % kLag];
    if (j >= kLag) update_param<kVariant>(u, mask, (j - kLag) * V::kWidth, s.param, before);
    else if (pending.param) update_param<kVariant>(u, *pending.mask, kBlock + (j - kLag) * V::kWidth, pending.param, before);
    before = direction;
  }
  pending.param = s.param;
  pending.mask = &mask;
}

// Up to a block: whole vectors, then the last few elements through copies on the stack.
template <Variant kVariant, typename V, typename P, typename M>
GRADDROP_FN void update_part(const Update<V>& u, const BlockMask& mask, const Streams<P, M>& s, int count) {
  int i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth)
    update_param<kVariant>(u, mask, i, s.param, update_moments<kVariant>(u, mask, i, s));
  if (i >= count) return;
  const size_t rest = count - i;
  P param[V::kWidth] = {}, grad[V::kWidth] = {};
  M exp_avg[V::kWidth] = {}, exp_avg_sq[V::kWidth] = {}, max_exp_avg_sq[V::kWidth] = {};
  std::memcpy(param, s.param + i, rest * sizeof(P));
  if (kVariant != kZeroGradient || u.unscale) std::memcpy(grad, s.grad + i, rest * sizeof(P));
  std::memcpy(exp_avg, s.exp_avg + i, rest * sizeof(M));
  std::memcpy(exp_avg_sq, s.exp_avg_sq + i, rest * sizeof(M));
  std::memcpy(max_exp_avg_sq, s.max_exp_avg_sq + i, rest * sizeof(M));
  const Streams<P, M> copies = {param - i, grad - i, exp_avg - i, exp_avg_sq - i, max_exp_avg_sq - i};
  update_param<kVariant>(u, mask, i, copies.param, update_moments<kVariant>(u, mask, i, copies));
  std::memcpy(s.param + i, param, rest * sizeof(P));
  if (u.unscale) std::memcpy(s.grad + i, grad, rest * sizeof(P));
  std::memcpy(s.exp_avg + i, exp_avg, rest * sizeof(M));
  std::memcpy(s.exp_avg_sq + i, exp_avg_sq, rest * sizeof(M));
  if (u.amsgrad) std::memcpy(s.max_exp_avg_sq + i, max_exp_avg_sq, rest * sizeof(M));
}

// Factors 1 + scale * z of count <= 64 elements from a global index on; a 32-bit word an element, four a call.
GRADDROP_FN void make_factors(const MaskSpec& mask, const PhiloxKeys& keys, int64_t global, int count, float* factors) {
  alignas(64) uint32_t words[kBlock + 32 + Vec::kWidth];
  const int lead = static_cast<int>(global & 3);
  for (int i = 0; i < lead + count; i += 32)
    philox_8_calls((static_cast<uint64_t>(global) >> 2) + i / 4, mask.draw, kDomainGaussian, keys, words + i);
  for (int i = 0; i < count; i += Vec::kWidth)
    store(factors + i, fma(normal_from_uniform(symmetric_uniform(words + lead + i)), Vec(mask.scale), Vec(1.0f)));
}

// Up to 64 elements whose mask is made on the spot:
// where blocks do not follow each other in step with the Philox calls.
template <Variant kVariant, typename P, typename M>
static __attribute__((noinline)) void masked_part(const PreparedRow& row, const PhiloxKeys& keys, int64_t local,
                                                  int64_t global, int count) {
  using V = typename VectorFor<P, M>::Type;
  alignas(64) uint32_t words[kBlock];
  alignas(64) float factors[kBlock];
  uint16_t* u16 = reinterpret_cast<uint16_t*>(words);
  BlockMask mask;
  mask.factors = factors;
  if (kVariant == kFactor) {
    make_factors(row.mask, keys, global, count, factors);
  } else if (selects(kVariant) && row.mask.kind == kFixed) {
    keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), mask.keep);
  } else if (selects(kVariant) && row.mask.kind == kBucket && row.mask.num_planes >= 0) {
    mask_from_planes(row, local, u16, mask);
  } else if (selects(kVariant)) {
    // Draws begin at a whole call; the first `lead` of them belong to the elements before.
    // lead + count <= 64, see below.
    philox_8_calls(static_cast<uint64_t>(global) >> 3, row.mask.draw, domain_of(row.mask), keys, words);
    mask_from_draws(row.mask, u16 + (global & 7), mask);
  }
  update_part<kVariant>(make_update<V>(row), mask, streams_at<P, M>(row, local), count);
}

// Whole blocks, one after the other; drawn masks begin at a global index that is a multiple of 8.
template <Variant kVariant, bool kDrawn, typename P, typename M>
GRADDROP_FN void whole_blocks(const PreparedRow& row, const PhiloxKeys& keys, int64_t local, int64_t global,
                              int64_t blocks) {
  using V = typename VectorFor<P, M>::Type;
  const auto u = make_update<V>(row);
  const MaskSpec spec = row.mask;
  const uint32_t domain = domain_of(spec);
  Pending<V, P> pending;
  BlockMask masks[2];  // of this block, and of the one before, whose parameters are still to be done
  alignas(64) uint32_t words[3][kBlock / 2];  // and of the next
  alignas(64) float factors[kBlock];
  Philox8 next;
  uint64_t call = static_cast<uint64_t>(global) >> 3;
  if (kDrawn && selects(kVariant) && blocks > 0) philox_8_calls(call, spec.draw, domain, keys, words[0]);
  for (int64_t block = 0, slot = 0; block < blocks; ++block, local += kBlock) {
    uint16_t* u16 = reinterpret_cast<uint16_t*>(words[slot]);
    BlockMask& mask = masks[block % 2];
    slot = slot == 2 ? 0 : slot + 1;
    if (kVariant == kFactor) {
      make_factors(spec, keys, global + block * kBlock, kBlock, factors);
      mask.factors = factors;
    } else if (kDrawn) {
      mask_from_draws(spec, u16, mask);
      call += 8;
      philox_start(next, call, spec.draw, domain);
    } else if (selects(kVariant) && spec.kind == kFixed) {
      keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), mask.keep);
    } else if (selects(kVariant)) {
      mask_from_planes(row, local, u16, mask);
    }
    update_block<kVariant>(u, mask, streams_at<P, M>(row, local), pending, [&](int j, int vectors) __attribute__((always_inline)) {
      if (!kDrawn || !selects(kVariant)) return;
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round)
        if (round * vectors / kPhiloxRounds == j) philox_round(next, keys, round);
    });
    if (kDrawn && selects(kVariant)) philox_finish(next, words[slot]);
  }
  finish<kVariant>(u, pending);
}

template <Variant kVariant, typename P, typename M>
static __attribute__((noinline)) void masked_adamw_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  const bool drawn =
      kVariant == kFactor ||
      (selects(kVariant) && (row.mask.kind == kBernoulli || (row.mask.kind == kBucket && row.mask.num_planes < 0)));
  const PhiloxKeys keys = philox_keys(row.mask.key);
  if (!drawn) {  // nothing random: the layout does not matter
    const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
    whole_blocks<kVariant, false, P, M>(row, keys, begin, 0, blocks);
    if (rest < end) masked_part<kVariant, P, M>(row, keys, rest, 0, static_cast<int>(end - rest));
    return;
  }
  for_each_run(row.tensor, begin, end, [&](int64_t local, int64_t global, int64_t left) {
    while (left > 0) {
      // Up to a multiple of 8 in the global index,
      // so that only a run's first part begins in the middle of a Philox call.
      int64_t count = std::min<int64_t>(left, kBlock - (global & 7));
      if (count == kBlock) {
        count = left / kBlock * kBlock;
        whole_blocks<kVariant, true, P, M>(row, keys, local, global, left / kBlock);
      } else {
        masked_part<kVariant, P, M>(row, keys, local, global, static_cast<int>(count));
      }
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
    case kBFloat16:
      if (wide_moments) return masked_adamw_typed<BFloat16, float>(row, begin, end);
      return masked_adamw_typed<BFloat16, BFloat16>(row, begin, end);
    case kFloat16:
      if (wide_moments) return masked_adamw_typed<Float16, float>(row, begin, end);
      return masked_adamw_typed<Float16, Float16>(row, begin, end);
  }
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
