// The block loop of the step. Vec and Vec2 come from the simd_*.h that was included before.
//
// A block is 64 elements of one contiguous run, hence eight Philox calls. For every vector of a block the loop does
// three independent pieces of work: some rounds of the random numbers of the next block, the moments of this vector,
// and the parameters of the vector kLag before, whose square roots are then ready. Done one after the other, each would
// wait for its own square root, division or chain of multiplications. In this order the memory, the divider and the
// integer units work at the same time.
// Measured on Zen 4, one thread, 24M float32, as ratios to torch's unmasked fused step. Random numbers for 256 elements
// and then their update: 1.20, with software prefetch 1.54. The three in turn by whole blocks: 1.00 to 1.10. Vector by
// vector, as here, takes 0.97 of that with AVX-512 and 0.93 with AVX2, from the cache.
#pragma once
#include <type_traits>

#include "block_mask.h"

namespace graddrop {
namespace {

// The element types of a row's parameters, gradients and moments, and the register in which they are computed.
template <typename Param, typename Grad, typename Moment, int kStochastic = 0>
struct Types {
  using P = Param;
  using G = Grad;
  using M = Moment;
  using V = typename VectorFor<P, M>::Type;
  // the parameters are masters, which are rounded into copies of the gradients' type
  static constexpr bool kMaster = !std::is_same<P, G>::value;
  static constexpr bool kRoundsParams = kStochastic & kRoundParams, kRoundsMoments = kStochastic & kRoundMoments;
};

// The values that all vectors of a row share. Copy it into the loop that uses it, so that no store can alias it and it
// stays in registers.
template <typename V>
struct Update {
  AdamWScalars<V> scalars;
  V factor;  // sign, times the scale of kept gradients
  AgeTables by_age;
  int64_t num_ages;
  V grad_scale, clip_factor;
  Decay decay;
  bool amsgrad, unscale;
  bool rescale;  // by either of the two
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

template <bool kKeptOnly, typename E, typename V>
GRADDROP_FN void store_result(E* target, const typename V::LaneMask& keep, V value) {
  if (kKeptOnly) store_kept(target, keep, value);
  else store(target, value);
}

// The moments of one vector, elements i .. i + V::kWidth of a block.
template <Variant kVariant, typename T, typename V>
GRADDROP_FN AdamWDirection<V> update_moments(const Update<V>& u, const BlockMask& mask, int i, const Streams<T>& s) {
  typename V::LaneMask keep{};
  if (masks_gradient(kVariant)) lanes_at(mask.keep, i, keep);
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
  if (T::kRoundsMoments) {
    const uint32_t* words = mask.rounding_moments + i;
    e.exp_avg = round_stochastically(e.exp_avg, words);
    e.exp_avg_sq = round_by_lower_half(e.exp_avg_sq, words);
    if (u.amsgrad) e.max_exp_avg_sq = round_by_lower_half(e.max_exp_avg_sq, words);
  }
  store_result<freezes_moments(kVariant)>(s.exp_avg + i, keep, e.exp_avg);
  store_result<freezes_moments(kVariant)>(s.exp_avg_sq + i, keep, e.exp_avg_sq);
  if (u.amsgrad) store_result<freezes_moments(kVariant)>(s.max_exp_avg_sq + i, keep, e.max_exp_avg_sq);
  return direction;
}

// The parameters of one vector, and their copies.
template <Variant kVariant, typename T, typename V>
GRADDROP_FN void update_param(const Update<V>& u, const BlockMask& mask, int i, typename T::P* param,
                              typename T::G* copy, const AdamWDirection<V>& direction) {
  typename V::LaneMask keep{};
  if (freezes_param(kVariant)) lanes_at(mask.keep, i, keep);
  AdamWScalars<V> scalars = u.scalars;
  if (kVariant == kFrozenByAge) {
    lookup(u.by_age.bias_correction2_sqrt, u.num_ages, mask.buckets + i, scalars.bias_correction2_sqrt);
    lookup(u.by_age.bias_correction2_sqrt_reciprocal, u.num_ages, mask.buckets + i,
           scalars.bias_correction2_sqrt_reciprocal);
  }
  V updated = adamw_param(load<V>(param + i), direction, scalars, u.decay);
  if (T::kRoundsParams) updated = round_stochastically(updated, mask.rounding + i);
  store_result<freezes_param(kVariant)>(param + i, keep, updated);
  if (T::kMaster) store_result<freezes_param(kVariant)>(copy + i, keep, updated);
}

// The number of vectors whose moments are done and whose parameters are not: the last kLag of the block before.
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

// The moments of a whole block, and the parameters of its vectors, kLag vectors later so that square roots are ready.
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

// Up to 64 elements whose mask is made on the spot: parts that are no whole blocks in step with the Philox calls.
template <Variant kVariant, typename T>
static __attribute__((noinline)) void masked_part(const PreparedRow& row, const PhiloxKeys& keys, int64_t local,
                                                  int64_t global, int count) {
  PartMask part;
  Words rounding, rounding_moments;
  make_mask<kVariant>(row, keys, local, global, count, part);
  if (T::kRoundsParams) part.mask.rounding = make_rounding(row, kDomainRounding, keys, global, count, rounding);
  if (T::kRoundsMoments)
    part.mask.rounding_moments = make_rounding(row, kDomainMoments, keys, global, count, rounding_moments);
  update_part<kVariant>(make_update<typename T::V>(row), part.mask, streams_at<T>(row, local), count);
}

// Whole blocks, one after the other. Drawn masks begin at a global index that is a multiple of 8. The random words of
// stochastic rounding are made beside the work, like those of the mask. The step then takes 0.91 (AVX-512) and 0.88
// (AVX2) of its time with all of them made before the block. The cost that remains over rounding to nearest is their 16
// Philox calls per block, 120 of 500 instructions with AVX-512: from the cache the step takes as long as from memory.
template <Variant kVariant, bool kDrawn, typename T>
GRADDROP_FN void whole_blocks(const PreparedRow& row, const PhiloxKeys& keys, int64_t local, int64_t global,
                              int64_t blocks) {
  const auto u = make_update<typename T::V>(row);
  const MaskSpec spec = row.mask;
  constexpr bool kDraws = kDrawn && selects(kVariant);
  Pending<T> pending;
  BlockMask masks[2];  // of this block, and of the one before, whose parameters are still to be done
  alignas(64) uint32_t words[3][kBlock / 2], rounding[3][kBlock], rounding_moments[3][kBlock];  // and of the next
  alignas(64) float factors[kBlock];
  CallsAhead<1> draws = {static_cast<uint64_t>(global) >> 3, spec.draw, domain_of(spec)};
  CallsAhead<2> roundings = {static_cast<uint64_t>(global) >> 2, row.rounding_draw, kDomainRounding};
  CallsAhead<2> roundings_of_moments = {static_cast<uint64_t>(global) >> 2, row.rounding_draw, kDomainMoments};
  if (kDraws) make_first(draws, keys, words[0]);
  if (T::kRoundsParams) make_first(roundings, keys, rounding[0]);
  if (T::kRoundsMoments) make_first(roundings_of_moments, keys, rounding_moments[0]);
  for (int64_t block = 0, slot = 0; block < blocks; ++block, local += kBlock) {
    uint16_t* u16 = reinterpret_cast<uint16_t*>(words[slot]);
    BlockMask& mask = masks[block % 2];
    if (T::kRoundsParams) mask.rounding = rounding[slot];
    if (T::kRoundsMoments) mask.rounding_moments = rounding_moments[slot];
    slot = slot == 2 ? 0 : slot + 1;
    if (kVariant == kFactor) {
      mask.factors = make_factors(spec, keys, global + block * kBlock, kBlock, factors);
    } else if (kDrawn) {
      mask_from_draws(spec, u16, mask);
    } else if (kVariant == kMaskedUpdate && spec.kind == kOff) {
      keep_bits(0, mask.keep);
    } else if (selects(kVariant) && spec.kind == kFixed) {
      keep_bits(bits_at(row.tensor.mask_words, row.tensor.numel, local), mask.keep);
    } else if (selects(kVariant)) {
      mask_from_planes(row, local, u16, mask);
    }
    if (kDraws) start_next(draws);
    if (T::kRoundsParams) start_next(roundings);
    if (T::kRoundsMoments) start_next(roundings_of_moments);
    const auto between = [&](int part, int parts) __attribute__((always_inline)) {
      if (kDraws) advance_next(draws, keys, part, parts);
      if (T::kRoundsParams) advance_next(roundings, keys, part, parts);
      if (T::kRoundsMoments) advance_next(roundings_of_moments, keys, part, parts);
    };
    update_block<kVariant>(u, mask, streams_at<T>(row, local), pending, between);
    if (kDraws) finish_next(draws, words[slot]);
    if (T::kRoundsParams) finish_next(roundings, rounding[slot]);
    if (T::kRoundsMoments) finish_next(roundings_of_moments, rounding_moments[slot]);
  }
  finish<kVariant>(u, pending);
}

template <Variant kVariant, typename T>
static __attribute__((noinline)) void masked_adamw_variant(const PreparedRow& row, int64_t begin, int64_t end) {
  constexpr bool kRounds = T::kRoundsParams || T::kRoundsMoments;
  const bool drawn = is_drawn<kVariant>(row.mask);
  const PhiloxKeys keys = philox_keys(row.mask.key);
  if (!drawn && !kRounds) {  // nothing random: the layout does not matter
    const int64_t blocks = (end - begin) / kBlock, rest = begin + blocks * kBlock;
    whole_blocks<kVariant, false, T>(row, keys, begin, 0, blocks);
    if (rest < end) masked_part<kVariant, T>(row, keys, rest, 0, static_cast<int>(end - rest));
    return;
  }
  for_each_part(
      row.tensor, begin, end,
      [&](int64_t local, int64_t global, int64_t blocks) {
        if (drawn || !kRounds) whole_blocks<kVariant, true, T>(row, keys, local, global, blocks);
        else whole_blocks<kVariant, false, T>(row, keys, local, global, blocks);
      },
      [&](int64_t local, int64_t global, int count) { masked_part<kVariant, T>(row, keys, local, global, count); });
}

template <typename T>
static void masked_adamw_typed(const PreparedRow& row, int64_t begin, int64_t end) {
  const bool frozen = row.mask.masked == kMaskFrozen;
  switch (row.mask.kind) {
    case kKeep: return masked_adamw_variant<kPlain, T>(row, begin, end);
    case kOff:
      if (frozen) return;
      if (row.mask.masked == kMaskGradient) return masked_adamw_variant<kZeroGradient, T>(row, begin, end);
      return masked_adamw_variant<kMaskedUpdate, T>(row, begin, end);
    case kGaussian: return masked_adamw_variant<kFactor, T>(row, begin, end);
    default:
      if (row.mask.masked == kMaskUpdate) return masked_adamw_variant<kMaskedUpdate, T>(row, begin, end);
      if (!frozen) return masked_adamw_variant<kMaskedGradient, T>(row, begin, end);
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
      if (wide_moments) return masked_adamw_typed<Types<float, float, float>>(row, begin, end);
      if (mode.stochastic) return masked_adamw_typed<Types<float, float, BFloat16, kRoundMoments>>(row, begin, end);
      return masked_adamw_typed<Types<float, float, BFloat16>>(row, begin, end);
    case kBFloat16:
      if (wide_moments) {
        if (mode.stochastic) return masked_adamw_typed<Types<BFloat16, BFloat16, float, kRoundParams>>(row, begin, end);
        return masked_adamw_typed<Types<BFloat16, BFloat16, float>>(row, begin, end);
      }
      switch (mode.stochastic) {
        case kRoundParams | kRoundMoments:
          return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16, kRoundParams | kRoundMoments>>(row, begin, end);
        case kRoundMoments:
          return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16, kRoundMoments>>(row, begin, end);
        case kRoundParams:
          return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16, kRoundParams>>(row, begin, end);
        default: return masked_adamw_typed<Types<BFloat16, BFloat16, BFloat16>>(row, begin, end);
      }
    case kFloat16:
      if (wide_moments) return masked_adamw_typed<Types<Float16, Float16, float>>(row, begin, end);
      return masked_adamw_typed<Types<Float16, Float16, Float16>>(row, begin, end);
  }
}

}  // namespace
}  // namespace graddrop
