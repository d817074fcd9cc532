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
#include <type_traits>

#include "../gaussian.h"
#include "kernels.h"

namespace graddrop {
namespace {

constexpr int kBlock = 64;  // elements

// The elements of a row's parameters, gradients and moments, and the register they are computed in.
template <typename Param, typename Grad, typename Moment, bool kRoundsStochastically = false>
struct Types {
  using P = Param;
  using G = Grad;
  using M = Moment;
  using V = typename VectorFor<P, M>::Type;
  // the parameters are masters, and copies of the gradients' type get them rounded
  static constexpr bool kMaster = !std::is_same<P, G>::value;
  static constexpr bool kStochastic = kRoundsStochastically;
};

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

// The Philox calls of one block after the other, kEights * 8 a block: those of the next block are made round by round
// beside the work on this one.
template <int kEights>
struct CallsAhead {
  uint64_t call;  // the first of this block
  uint32_t draw, domain;
  Philox8 next[kEights];
};
// This block's, at once: for the first one of a run. Not inlined: it is seldom called.
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

// What a block's update needs to know of its mask; entry 0 is the block's first element.
struct BlockMask {
  Keep keep;
  const uint16_t* buckets = nullptr;  // of each element, for the ages
  const float* factors = nullptr;     // kGaussian
  const uint32_t* rounding = nullptr;  // random words: stochastic rounding
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

GRADDROP_FN float scale_of(const MaskSpec& mask) {  // of kept gradients
  return mask.kind == kBernoulli || mask.kind == kFixed ? mask.scale : 1.0f;
}

// What all vectors of a row share, to be kept in registers: copy it into the loop that uses it,
// so that no store can alias it.
template <typename V>
struct Update {
  AdamWScalars<V> scalars;
  V factor;  // sign, times the scale of kept gradients
  AgeTables by_age;
  int64_t num_ages;
  V grad_scale, clip_factor;
  bool decay, amsgrad, unscale;
  bool rescale;  // by any of the two
};
template <typename V>
GRADDROP_FN Update<V> make_update(const PreparedRow& row) {
  const AdamWScalars<float>& s = row.scalars;
  return {{V(s.lr_weight_decay), V(s.beta1), V(s.beta2), V(s.step_size), V(s.bias_correction2_sqrt),
           V(s.bias_correction2_sqrt_reciprocal), V(s.eps)},
          V(row.sign * scale_of(row.mask)),
          row.by_age,
          row.num_ages,
          V(row.mode.grad_scale ? *row.mode.grad_scale : 1.0f),
          V(row.mode.clip_factor ? *row.mode.clip_factor : 1.0f),
          row.decay,
          row.amsgrad,
          row.mode.grad_scale != nullptr,
          row.mode.grad_scale || row.mode.clip_factor};
}

// The tensors of a row from one local index on.
template <typename T>
struct Streams {
  typename T::P* param;
  typename T::G *grad, *copy;  // copy: with masters
  typename T::M *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
};
template <typename T>
GRADDROP_FN Streams<T> streams_at(const PreparedRow& row, int64_t local) {
  using G = typename T::G;
  using M = typename T::M;
  const TensorRow& t = row.tensor;
  return {static_cast<typename T::P*>(t.param) + local,
          static_cast<G*>(const_cast<void*>(t.grad)) + local,
          static_cast<G*>(T::kMaster ? t.copy : const_cast<void*>(t.grad)) + local,
          static_cast<M*>(t.exp_avg) + local,
          static_cast<M*>(t.exp_avg_sq) + local,
          static_cast<M*>(row.amsgrad ? t.max_exp_avg_sq : t.exp_avg_sq) + local};
}

constexpr bool selects(Variant variant) {
  return variant == kMaskedGradient || variant == kFrozen || variant == kFrozenByAge;
}
constexpr bool freezes(Variant variant) { return variant == kFrozen || variant == kFrozenByAge; }

template <Variant kVariant, typename E, typename V>
GRADDROP_FN void store_result(E* target, const typename V::LaneMask& keep, V value) {
  if (freezes(kVariant)) store_kept(target, keep, value);
  else store(target, value);
}

// What the mask makes of a vector of gradients.
template <Variant kVariant, typename V>
GRADDROP_FN V masked_gradient(V g, V factor, const typename V::LaneMask& keep, const BlockMask& mask, int i) {
  g = kVariant == kZeroGradient ? V(0.0f) : g * factor;
  if (kVariant == kFactor) g = g * load<V>(mask.factors + i);
  if (selects(kVariant)) g = keep_or_zero(keep, g);
  return g;
}

// The moments of one vector, elements i .. i + V::kWidth of a block.
template <Variant kVariant, typename T, typename V>
GRADDROP_FN AdamWDirection<V> update_moments(const Update<V>& u, const BlockMask& mask, int i, const Streams<T>& s) {
  typename V::LaneMask keep{};
  if (selects(kVariant)) lanes_at(mask.keep, i, keep);
  V g(0.0f);
  if (kVariant != kZeroGradient || u.unscale) g = load<V>(s.grad + i);
  // one branch for both, so that a step with neither pays for one
  if (kVariant == kZeroGradient ? u.unscale : u.rescale) {
    if (u.unscale) {
      g = div(g, u.grad_scale);
      store(s.grad + i, g);
    }
    g = g * u.clip_factor;
  }
  g = masked_gradient<kVariant>(g, u.factor, keep, mask, i);

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

// The parameters of one vector, and their copies.
template <Variant kVariant, typename T, typename V>
GRADDROP_FN void update_param(const Update<V>& u, const BlockMask& mask, int i, typename T::P* param,
                              typename T::G* copy, const AdamWDirection<V>& direction) {
  typename V::LaneMask keep{};
  if (freezes(kVariant)) lanes_at(mask.keep, i, keep);
  AdamWScalars<V> scalars = u.scalars;
  if (kVariant == kFrozenByAge) {
    lookup(u.by_age.bias_correction2_sqrt, u.num_ages, mask.buckets + i, scalars.bias_correction2_sqrt);
    lookup(u.by_age.bias_correction2_sqrt_reciprocal, u.num_ages, mask.buckets + i,
           scalars.bias_correction2_sqrt_reciprocal);
  }
  V updated = adamw_param(load<V>(param + i), direction, scalars, u.decay);
  if (T::kStochastic) updated = round_stochastically(updated, mask.rounding + i);
  store_result<kVariant>(param + i, keep, updated);
  if (T::kMaster) store_result<kVariant>(copy + i, keep, updated);
}

// Vectors whose moments are done and whose parameters are not: the last kLag of the block before.
constexpr int kLag = 2;
template <typename T>
struct Pending {
  typename T::P* param = nullptr;  // of the block before
  typename T::G* copy = nullptr;
  const BlockMask* mask = nullptr;
  AdamWDirection<typename T::V> direction[kLag];
};

template <Variant kVariant, typename T, typename V>
GRADDROP_FN void finish(const Update<V>& u, const Pending<T>& pending) {
  if (!pending.param) return;
#pragma GCC unroll 8
  for (int j = 0; j < kLag; ++j)
    update_param<kVariant, T>(u, *pending.mask, kBlock + (j - kLag) * V::kWidth, pending.param, pending.copy,
                              pending.direction[j]);
}

// The moments of a whole block, and the parameters of its vectors kLag later, so that their square roots are ready.
template <Variant kVariant, typename T, typename V, typename Between>
GRADDROP_FN void update_block(const Update<V>& u, const BlockMask& mask, const Streams<T>& s, Pending<T>& pending,
                              Between between) {
  constexpr int kVectors = kBlock / V::kWidth;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    between(2 * j, 2 * kVectors);
    const AdamWDirection<V> direction = update_moments<kVariant>(u, mask, j * V::kWidth, s);
    between(2 * j + 1, 2 * kVectors);
    AdamWDirection<V>& before = pending.direction[j % kLag];
    if (j >= kLag)
      update_param<kVariant, T>(u, mask, (j - kLag) * V::kWidth, s.param, s.copy, before);
    else if (pending.param)
      update_param<kVariant, T>(u, *pending.mask, kBlock + (j - kLag) * V::kWidth, pending.param, pending.copy, before);
    before = direction;
  }
  pending.param = s.param;
  pending.copy = s.copy;
  pending.mask = &mask;
}

// Up to a block: whole vectors, then the last few elements through copies on the stack.
template <Variant kVariant, typename T, typename V>
GRADDROP_FN void update_part(const Update<V>& u, const BlockMask& mask, const Streams<T>& s, int count) {
  using P = typename T::P;
  using G = typename T::G;
  using M = typename T::M;
  int i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth)
    update_param<kVariant, T>(u, mask, i, s.param, s.copy, update_moments<kVariant>(u, mask, i, s));
  if (i >= count) return;
  const size_t rest = count - i;
  P param[V::kWidth] = {};
  G grad[V::kWidth] = {}, copy[V::kWidth] = {};
  M exp_avg[V::kWidth] = {}, exp_avg_sq[V::kWidth] = {}, max_exp_avg_sq[V::kWidth] = {};
  std::memcpy(param, s.param + i, rest * sizeof(P));
  if (kVariant != kZeroGradient || u.unscale) std::memcpy(grad, s.grad + i, rest * sizeof(G));
  if (T::kMaster) std::memcpy(copy, s.copy + i, rest * sizeof(G));
  std::memcpy(exp_avg, s.exp_avg + i, rest * sizeof(M));
  std::memcpy(exp_avg_sq, s.exp_avg_sq + i, rest * sizeof(M));
  std::memcpy(max_exp_avg_sq, s.max_exp_avg_sq + i, rest * sizeof(M));
  const Streams<T> copies = {param - i, grad - i, copy - i, exp_avg - i, exp_avg_sq - i, max_exp_avg_sq - i};
  update_param<kVariant, T>(u, mask, i, copies.param, copies.copy, update_moments<kVariant>(u, mask, i, copies));
  std::memcpy(s.param + i, param, rest * sizeof(P));
  if (u.unscale) std::memcpy(s.grad + i, grad, rest * sizeof(G));
  if (T::kMaster) std::memcpy(s.copy + i, copy, rest * sizeof(G));
  std::memcpy(s.exp_avg + i, exp_avg, rest * sizeof(M));
  std::memcpy(s.exp_avg_sq + i, exp_avg_sq, rest * sizeof(M));
  if (u.amsgrad) std::memcpy(s.max_exp_avg_sq + i, max_exp_avg_sq, rest * sizeof(M));
}

// Random words of 32 bits, four a call, of up to 64 elements from any global index on.
struct Words {
  alignas(64) uint32_t word[kBlock + 32 + Vec::kWidth];
};
// Those of count elements: the result is the first one's. The last vector may read some of what comes after them.
GRADDROP_FN const uint32_t* make_words(uint32_t draw, uint32_t domain, const PhiloxKeys& keys, int64_t global,
                                       int count, Words& words) {
  const int lead = static_cast<int>(global & 3);
  for (int i = 0; i < lead + count; i += 32)
    philox_8_calls((static_cast<uint64_t>(global) >> 2) + i / 4, draw, domain, keys, words.word + i);
  return words.word + lead;
}

// Those of stochastic rounding; one copy of the code, which is called once a block.
static __attribute__((noinline)) const uint32_t* make_rounding(const PreparedRow& row, const PhiloxKeys& keys,
                                                               int64_t global, int count, Words& words) {
  return make_words(row.rounding_draw, kDomainRounding, keys, global, count, words);
}

// Factors 1 + scale * z of count <= 64 elements from a global index on.
GRADDROP_FN void make_factors(const MaskSpec& mask, const PhiloxKeys& keys, int64_t global, int count, float* factors) {
  Words words;
  const uint32_t* first = make_words(mask.draw, kDomainGaussian, keys, global, count, words);
  for (int i = 0; i < count; i += Vec::kWidth)
    store(factors + i, fma(normal_from_uniform(symmetric_uniform(first + i)), Vec(mask.scale), Vec(1.0f)));
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
  part.mask.factors = part.factors;
  if (kVariant == kFactor) {
    make_factors(row.mask, keys, global, count, part.factors);
  } else if (selects(kVariant) && row.mask.kind == kFixed) {
    keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), part.mask.keep);
  } else if (selects(kVariant) && row.mask.kind == kBucket && row.mask.num_planes >= 0) {
    mask_from_planes(row, local, u16, part.mask);
  } else if (selects(kVariant)) {
    // Draws begin at a whole call; the first `lead` of them belong to the elements before.
    // lead + count <= 64, see part_of.
    philox_8_calls(static_cast<uint64_t>(global) >> 3, row.mask.draw, domain_of(row.mask), keys, part.words);
    mask_from_draws(row.mask, u16 + (global & 7), part.mask);
  }
}

// How many of the elements left from a global index on make a part: up to 64, and up to a multiple of 8 in the global
// index, so that only a run's first part begins in the middle of a Philox call.
GRADDROP_FN int64_t part_of(int64_t left, int64_t global) { return std::min<int64_t>(left, kBlock - (global & 7)); }

// Local elements [begin, end) of a row: whole(local, global, blocks) for blocks that begin at a global index that is a
// multiple of 8, part(local, global, count) for what is between them.
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

// Whether a row's masks depend on where its elements lie in the whole parameter.
template <Variant kVariant>
GRADDROP_FN bool is_drawn(const MaskSpec& mask) {
  return kVariant == kFactor ||
         (selects(kVariant) && (mask.kind == kBernoulli || (mask.kind == kBucket && mask.num_planes < 0)));
}

// Up to 64 elements whose mask is made on the spot:
// where blocks do not follow each other in step with the Philox calls.
template <Variant kVariant, typename T>
static __attribute__((noinline)) void masked_part(const PreparedRow& row, const PhiloxKeys& keys, int64_t local,
                                                  int64_t global, int count) {
  PartMask part;
  Words rounding;
  make_mask<kVariant>(row, keys, local, global, count, part);
  if (T::kStochastic) part.mask.rounding = make_rounding(row, keys, global, count, rounding);
  update_part<kVariant>(make_update<typename T::V>(row), part.mask, streams_at<T>(row, local), count);
}

// Whole blocks, one after the other; what is drawn begins at a global index that is a multiple of 8. The random words
// of stochastic rounding are made beside the work as those of the mask are: the step takes 0.91 (AVX-512) and 0.88
// (AVX2) of its time with all of them made before the block. What is left over rounding to nearest is their 16 Philox
// calls a block, 120 of 500 instructions with AVX-512: from the cache the step takes as long as from memory.
template <Variant kVariant, bool kDrawn, typename T>
GRADDROP_FN void whole_blocks(const PreparedRow& row, const PhiloxKeys& keys, int64_t local, int64_t global,
                              int64_t blocks) {
  const auto u = make_update<typename T::V>(row);
  const MaskSpec spec = row.mask;
  constexpr bool kDraws = kDrawn && selects(kVariant);
  Pending<T> pending;
  BlockMask masks[2];  // of this block, and of the one before, whose parameters are still to be done
  alignas(64) uint32_t words[3][kBlock / 2], rounding[3][kBlock];  // and of the next
  alignas(64) float factors[kBlock];
  CallsAhead<1> draws = {static_cast<uint64_t>(global) >> 3, spec.draw, domain_of(spec)};
  CallsAhead<2> roundings = {static_cast<uint64_t>(global) >> 2, row.rounding_draw, kDomainRounding};
  if (kDraws) make_first(draws, keys, words[0]);
  if (T::kStochastic) make_first(roundings, keys, rounding[0]);
  for (int64_t block = 0, slot = 0; block < blocks; ++block, local += kBlock) {
    uint16_t* u16 = reinterpret_cast<uint16_t*>(words[slot]);
    BlockMask& mask = masks[block % 2];
    if (T::kStochastic) mask.rounding = rounding[slot];
    slot = slot == 2 ? 0 : slot + 1;
    if (kVariant == kFactor) {
      make_factors(spec, keys, global + block * kBlock, kBlock, factors);
      mask.factors = factors;
    } else if (kDrawn) {
      mask_from_draws(spec, u16, mask);
    } else if (selects(kVariant) && spec.kind == kFixed) {
      keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), mask.keep);
    } else if (selects(kVariant)) {
      mask_from_planes(row, local, u16, mask);
    }
    if (kDraws) start_next(draws);
    if (T::kStochastic) start_next(roundings);
    const auto between = [&](int part, int parts) __attribute__((always_inline)) {
      if (kDraws) advance_next(draws, keys, part, parts);
      if (T::kStochastic) advance_next(roundings, keys, part, parts);
    };
    update_block<kVariant>(u, mask, streams_at<T>(row, local), pending, between);
    if (kDraws) finish_next(draws, words[slot]);
    if (T::kStochastic) finish_next(roundings, rounding[slot]);
  }
  finish<kVariant>(u, pending);
}

template <Variant kVariant, typename T>
static __attribute__((noinline)) void masked_adamw_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  const bool drawn = is_drawn<kVariant>(row.mask);
  const PhiloxKeys keys = philox_keys(row.mask.key);
  if (!drawn && !T::kStochastic) {  // nothing random: the layout does not matter
    const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
    whole_blocks<kVariant, false, T>(row, keys, begin, 0, blocks);
    if (rest < end) masked_part<kVariant, T>(row, keys, rest, 0, static_cast<int>(end - rest));
    return;
  }
  for_each_part(
      row.tensor, begin, end,
      [&](int64_t local, int64_t global, int64_t blocks) {
        if (drawn || !T::kStochastic) whole_blocks<kVariant, true, T>(row, keys, local, global, blocks);
        else whole_blocks<kVariant, false, T>(row, keys, local, global, blocks);
      },
      [&](int64_t local, int64_t global, int count) { masked_part<kVariant, T>(row, keys, local, global, count); });
}

template <typename T>
static void masked_adamw_typed(const PreparedRow& row, int64_t begin, int64_t end) {
  switch (row.mask.kind) {
    case kKeep: return masked_adamw_variant<kPlain, T>(row, begin, end);
    case kOff: return row.mask.frozen ? void() : masked_adamw_variant<kZeroGradient, T>(row, begin, end);
    case kGaussian: return masked_adamw_variant<kFactor, T>(row, begin, end);
    default:
      if (!row.mask.frozen) return masked_adamw_variant<kMaskedGradient, T>(row, begin, end);
      if (row.num_ages) return masked_adamw_variant<kFrozenByAge, T>(row, begin, end);
      return masked_adamw_variant<kFrozen, T>(row, begin, end);
  }
}

static void masked_adamw(const PreparedRow& row, int64_t begin, int64_t end) {
  const Mode& mode = row.mode;
  const bool wide_moments = mode.moment_dtype == kFloat32;
  switch (mode.param_dtype) {
    case kFloat32:
      if (mode.grad_dtype == kBFloat16) return masked_adamw_typed<Types<float, BFloat16, float>>(row, begin, end);
      if (mode.grad_dtype == kFloat16) return masked_adamw_typed<Types<float, Float16, float>>(row, begin, end);
      return masked_adamw_typed<Types<float, float, float>>(row, begin, end);
    case kBFloat16:
      if (mode.stochastic) {
        if (wide_moments) return masked_adamw_typed<Types<BFloat16, BFloat16, float, true>>(row, begin, end);
        return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16, true>>(row, begin, end);
      }
      if (wide_moments) return masked_adamw_typed<Types<BFloat16, BFloat16, float>>(row, begin, end);
      return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16>>(row, begin, end);
    case kFloat16:
      if (wide_moments) return masked_adamw_typed<Types<Float16, Float16, float>>(row, begin, end);
      return masked_adamw_typed<Types<Float16, Float16, Float16>>(row, begin, end);
  }
}

// Element i of a part is added to sum i % 16, whatever the width of a vector: all instruction sets give the same bits.
constexpr int kSums = 16;

struct BlockSums {  // in registers
  Squares sums[kSums / Vec::kWidth];
};
template <typename Masked>  // masked(i): vector of elements i .. i + Vec::kWidth
GRADDROP_FN void add_squares(BlockSums& sums, int i, Masked masked) {
#pragma GCC unroll 16
  for (int j = 0; j < kSums; j += Vec::kWidth) add_square(sums.sums[j / Vec::kWidth], masked(i + j));
}

// One vector of gradients as the mask leaves it.
template <Variant kVariant, typename G>
GRADDROP_FN Vec masked_vector(const G* grad, Vec factor, const BlockMask& mask, int i) {
  Lanes keep{};
  if (selects(kVariant)) lanes_at(mask.keep, i, keep);
  return masked_gradient<kVariant>(load<Vec>(grad + i), factor, keep, mask, i);
}

// Whole blocks, one after the other. With draws beside the squares it takes 0.77 of draws before them. Without a mask
// it is as fast as one core reads: 4 bytes an element at 25 GB/s, while the update moves its 28 at 42 GB/s, since it
// writes while it reads; so the norm costs a quarter of an update, not a seventh. Reading at two or four places at
// once, megabytes apart, takes 0.92 of it, prefetching what comes later 1.1 and more.
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
  if (!masked || row.mask.kind == kKeep) return sum_of_squares_variant<kPlain, G>(row, begin, end);
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
