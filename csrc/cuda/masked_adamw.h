// The work of one thread of one block: loads of 16 bytes, the mask, the update, stores. A tensor of any layout and
// alignment is done one element at a time. There is no shared memory and no barrier, so that the host can run it in a
// loop, thread after thread (masked_adamw.cu), as the tests do.
#pragma once
#include "../adamw.h"
#include "../stochastic.h"
#include "chunks.h"
#include "storage.h"

namespace graddrop {

GRADDROP_FN AdamWScalars<float> scalars_of(const StepRow& step) {
  return {step.lr_weight_decay, step.beta1, step.beta2, step.step_size, step.bias_correction2_sqrt,
          step.bias_correction2_sqrt_reciprocal, step.eps};
}

GRADDROP_FN Decay decay_of(const StepRow& step, bool cautious) {
  return !(step.flags & kDecayFlag) ? kNoDecay : cautious ? kCautiousDecay : kPlainDecay;
}

// The scalars of an element's bucket; ages: the tensor's part of by_age.
GRADDROP_FN void look_up_age(const float* ages, const StepRow& step, uint32_t bucket, AdamWScalars<float>& scalars) {
  struct alignas(16) Entry {
    float step_size, bias_correction2_sqrt, reciprocal, unused;
  };
  if (bucket >= step.num_ages) bucket = step.num_ages - 1;
  const Entry entry = reinterpret_cast<const Entry*>(ages)[bucket];
  scalars.step_size = entry.step_size;
  scalars.bias_correction2_sqrt = entry.bias_correction2_sqrt;
  scalars.bias_correction2_sqrt_reciprocal = entry.reciprocal;
}

// The update of one element in registers. g is masked, scaled and signed.
GRADDROP_LONG_FN void update(float& param, AdamWElement<float>& e, float g, const AdamWScalars<float>& scalars,
                             Decay decay, bool amsgrad) {
  const AdamWDirection<float> direction = adamw_moments(e, g, scalars, amsgrad);
  param = adamw_param(param, direction, scalars, decay);
}

// The element types of a launch's parameters, gradients and moments.
template <typename Param, typename Grad, typename Moment, int kStochastic = 0>
struct Types {
  using P = Param;
  using G = Grad;
  using M = Moment;
  // the parameters are masters, which are rounded into copies of the gradients' type
  static constexpr bool kMaster = sizeof(P) != sizeof(G);
  static constexpr bool kRoundsParams = kStochastic & kRoundParams, kRoundsMoments = kStochastic & kRoundMoments;
  // Neighbouring elements in one thread: eight, or four where that keeps a warp's accesses contiguous (thread_mask.h).
  static constexpr int kVector = sizeof(P) == 2 && sizeof(M) == 2 ? 8 : 4;
};

// The streams of a tensor from one element on.
template <typename T>
struct Streams {
  typename T::P* param;
  typename T::G *grad, *copy;  // copy: of masters
  typename T::M *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
};
template <typename T>
GRADDROP_FN Streams<T> streams_at(const TensorRow& row, int64_t i) {
  using G = typename T::G;
  using M = typename T::M;
  assume_global(row.param), assume_global(row.grad), assume_global(row.exp_avg), assume_global(row.exp_avg_sq);
  assume_global(row.max_exp_avg_sq), assume_global(row.copy);
  return {static_cast<typename T::P*>(row.param) + i,
          static_cast<G*>(const_cast<void*>(row.grad)) + i,
          static_cast<G*>(row.copy) + i,
          static_cast<M*>(row.exp_avg) + i,
          static_cast<M*>(row.exp_avg_sq) + i,
          static_cast<M*>(row.max_exp_avg_sq) + i};
}

template <typename T>
struct Registers {
  Group<typename T::P, T::kVector> param;
  Group<typename T::G, T::kVector> grad, copy;
  Group<typename T::M, T::kVector> exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// Third counter word of stochastic rounding: the steps completed before this one, which the prologue has counted.
GRADDROP_FN uint32_t rounding_draw(const TensorRow& row) { return static_cast<uint32_t>(*row.step) - 1; }

// The word of one element.
GRADDROP_FN uint32_t rounding_word(const TensorRow& row, int64_t i, Domain domain) {
  const uint64_t index = global_index(row, i);
  return word_at(philox_call(index / 4, rounding_draw(row), domain, row.key), index);
}

GRADDROP_FN void round_moments(AdamWElement<float>& e, uint32_t word) {
  e.exp_avg = round_stochastically(e.exp_avg, word);
  e.exp_avg_sq = round_by_lower_half(e.exp_avg_sq, word);
  e.max_exp_avg_sq = round_by_lower_half(e.max_exp_avg_sq, word);
}

// One turn of one lane, whose first group is s. All lanes of a warp must call it together. Groups that do not fit into
// the tensor are left out.
template <Variant kVariant, bool kAmsgrad, bool kCautious, typename T>
GRADDROP_LONG_FN void update_turn(const LaunchSpec& spec, const TensorRow& row, const StepRow& step, const float* ages,
                             const Turn& turn, const Streams<T>& s) {
  using P = typename T::P;
  using G = typename T::G;
  using M = typename T::M;
  constexpr int kVector = T::kVector, kGroups = kElements / kVector, kStride = kWarp * kVector;
  const bool off = !selects(kVariant) && (step.flags & kOffFlag);  // else the mask drops everything
  ThreadMask mask;
  make_mask<kVariant, kVector>(row, step, turn, mask);

  bool write[kElements], active[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    bool any_write = !freezes(kVariant) || of_update(kVariant) || spec.grad_scale;
#pragma unroll
    for (int e = group * kVector; e < (group + 1) * kVector; ++e) {
      write[e] = !freezes(kVariant) || mask.keep[e] || !(of_update(kVariant) || step.flags & kFrozenFlag);
      any_write |= write[e];
    }
    // A group that is frozen as a whole is neither read nor written.
    active[group] = group_offset<kVector>(turn.lane, group) + kVector <= turn.left && any_write;
  }

  Registers<T> r[kGroups];  // undefined for a group that is not active: computed with, but not stored
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int i = group * kStride;
    r[group].grad = {};
    if (!active[group]) continue;
    load(r[group].param, s.param + i);
    if (!off || spec.grad_scale) load(r[group].grad, s.grad + i);
    load(r[group].exp_avg, s.exp_avg + i);
    load(r[group].exp_avg_sq, s.exp_avg_sq + i);
    if (kAmsgrad) load(r[group].max_exp_avg_sq, s.max_exp_avg_sq + i);
    if (T::kMaster && freezes(kVariant)) load(r[group].copy, s.copy + i);
  }

  float g[kElements];
#pragma unroll
  for (int e = 0; e < kElements; e += 2)
    unpack(&r[e / kVector].grad.word[e % kVector / 2 * Group<G, kVector>::kWordsAPair], g[e], g[e + 1], G{});
  if (spec.grad_scale) {  // also for a dropped block, whose gradients are written back like others
    const float scale = *spec.grad_scale;
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      g[e] = div(g[e], scale), g[e + 1] = div(g[e + 1], scale);
      merge(&r[e / kVector].grad.word[e % kVector / 2 * Group<G, kVector>::kWordsAPair], g[e], g[e + 1], true, true,
            G{});
      if (off) g[e] = g[e + 1] = 0.0f;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (active[group]) store(s.grad + group * kStride, r[group].grad);
  }

  if (spec.clip_factor && !off) {
    const float factor = *spec.clip_factor;
#pragma unroll
    for (int e = 0; e < kElements; ++e) g[e] *= factor;
  }

  const AdamWScalars<float> shared = scalars_of(step);
  const Decay decay = decay_of(step, kCautious);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    Registers<T>& in = r[group];
    PhiloxWords rounding, rounding_moments;  // of four elements
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      const int first = group * kVector + i;
      uint32_t* const param_words = &in.param.word[i / 2 * Group<P, kVector>::kWordsAPair];
      const int g_word = i / 2 * Group<G, kVector>::kWordsAPair, m_word = i / 2 * Group<M, kVector>::kWordsAPair;
      if ((T::kRoundsParams || T::kRoundsMoments) && i % 4 == 0) {
        const uint64_t call = global_index(row, turn.first + group_offset<kVector>(turn.lane, group) + i) / 4;
        if (T::kRoundsParams) rounding = philox_call(call, rounding_draw(row), kDomainRounding, row.key);
        if (T::kRoundsMoments) rounding_moments = philox_call(call, rounding_draw(row), kDomainMoments, row.key);
      }
      float param[2];
      AdamWElement<float> e[2];
      unpack(param_words, param[0], param[1], P{});
      unpack(&in.exp_avg.word[m_word], e[0].exp_avg, e[1].exp_avg, M{});
      unpack(&in.exp_avg_sq.word[m_word], e[0].exp_avg_sq, e[1].exp_avg_sq, M{});
      if (kAmsgrad) unpack(&in.max_exp_avg_sq.word[m_word], e[0].max_exp_avg_sq, e[1].max_exp_avg_sq, M{});
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float kept = masked_gradient<kVariant>(g[first + j], step, mask, first + j);
        AdamWScalars<float> scalars = shared;
        if (by_age(kVariant) && step.num_ages) look_up_age(ages, step, mask.bucket[first + j], scalars);
        update(param[j], e[j], kept, scalars, decay, kAmsgrad);
        if (T::kRoundsParams) param[j] = round_stochastically(param[j], rounding.word[(i + j) % 4]);
        if (T::kRoundsMoments) round_moments(e[j], rounding_moments.word[(i + j) % 4]);
      }
      const bool w0 = write[first], w1 = write[first + 1];
      merge(param_words, param[0], param[1], w0, w1, P{});
      if (T::kMaster) merge(&in.copy.word[g_word], param[0], param[1], w0, w1, G{});
      const bool m0 = of_update(kVariant) || w0, m1 = of_update(kVariant) || w1;
      merge(&in.exp_avg.word[m_word], e[0].exp_avg, e[1].exp_avg, m0, m1, M{});
      merge(&in.exp_avg_sq.word[m_word], e[0].exp_avg_sq, e[1].exp_avg_sq, m0, m1, M{});
      if (kAmsgrad) merge(&in.max_exp_avg_sq.word[m_word], e[0].max_exp_avg_sq, e[1].max_exp_avg_sq, m0, m1, M{});
    }
    if (active[group]) {
      store(s.param + group * kStride, in.param);
      if (T::kMaster) store(s.copy + group * kStride, in.copy);
      store(s.exp_avg + group * kStride, in.exp_avg);
      store(s.exp_avg_sq + group * kStride, in.exp_avg_sq);
      if (kAmsgrad) store(s.max_exp_avg_sq + group * kStride, in.max_exp_avg_sq);
    }
  }
}

// The masking of a launch, for one element. An aligned kernel is compiled for it; the general one reads it.
struct ElementSpec {
  int32_t kind;
  bool planes, amsgrad, ages, update, cautious;
};

// One element of a row of any layout and alignment.
template <typename T>
GRADDROP_LONG_FN void update_element(const ElementSpec& how, const LaunchSpec& spec, const TensorRow& row,
                                const StepRow& step, const float* ages, int64_t i) {
  const ElementMask mask = element_mask(how.kind, how.planes, row, step, i);
  const bool off = step.flags & kOffFlag;
  const bool write_moments = mask.keep || how.update || !(step.flags & kFrozenFlag);
  const bool write_param = mask.keep || !(how.update || step.flags & kFrozenFlag);
  const Streams<T> s = streams_at<T>(row, i);
  float g = 0.0f;
  if (spec.grad_scale || (!off && write_moments)) g = widen(*s.grad);
  if (spec.grad_scale) {
    g = div(g, *spec.grad_scale);
    narrow(g, *s.grad);
  }
  if (!write_moments) return;
  if (spec.clip_factor) g *= *spec.clip_factor;
  g = masked_gradient(g, step, mask, how.update);
  AdamWScalars<float> scalars = scalars_of(step);
  if (how.ages && step.num_ages) look_up_age(ages, step, mask.bucket, scalars);
  float param = widen(*s.param);
  AdamWElement<float> e = {widen(*s.exp_avg), widen(*s.exp_avg_sq), 0.0f};
  if (how.amsgrad) e.max_exp_avg_sq = widen(*s.max_exp_avg_sq);
  update(param, e, g, scalars, decay_of(step, how.cautious), how.amsgrad);
  if (T::kRoundsParams) param = round_stochastically(param, rounding_word(row, i, kDomainRounding));
  if (T::kRoundsMoments) round_moments(e, rounding_word(row, i, kDomainMoments));
  if (write_param) {
    narrow(param, *s.param);
    if (T::kMaster) narrow(param, *s.copy);
  }
  narrow(e.exp_avg, *s.exp_avg);
  narrow(e.exp_avg_sq, *s.exp_avg_sq);
  if (how.amsgrad) narrow(e.max_exp_avg_sq, *s.max_exp_avg_sq);
}

// One block per chunk. The compiler then sees that the values of a row are the same for all threads, and keeps them in
// uniform registers. With false, for measurements, fewer blocks (masked_adamw.cu) walk the chunk list together.
constexpr bool kOneBlockAChunk = true;
GRADDROP_FN int64_t next_chunk(const LaunchSpec& spec, int64_t c, int num_blocks) {
  return kOneBlockAChunk ? spec.num_chunks : c + num_blocks;
}

// The work of one thread of one block.
template <Variant kVariant, bool kAmsgrad, bool kCautious, typename T>
GRADDROP_FN void aligned_thread(const LaunchSpec& spec, int block, int num_blocks, int thread) {
  constexpr int kVector = T::kVector;
  for (int64_t c = block; c < spec.num_chunks; c = next_chunk(spec, c, num_blocks)) {
    const Chunk chunk = chunk_at(spec, c);
    const StepRow step = spec.step_rows[chunk.tensor];
    if (step.flags & kSkipFlag) continue;
    const TensorRow row = spec.rows[chunk.tensor];  // a copy: no store can alias it
    const float* const ages = spec.by_age + chunk.tensor * spec.age_stride * 4;

    const int64_t end_of_groups = row.numel / kVector * kVector;  // the few elements after it are done one by one
    if (chunk.first + kChunk > end_of_groups && end_of_groups + thread < row.numel)
      update_element<T>({kind_of(kVariant), reads_bits(kVariant), kAmsgrad, by_age(kVariant), of_update(kVariant),
                         kCautious}, spec, row, step, ages, end_of_groups + thread);

    Turn turn = first_turn(row, chunk, thread);
    Streams<T> s = streams_at<T>(row, turn.first + turn.lane * kVector);
#pragma unroll 1
    for (; turn.left > 0; turn.left -= kTurn, turn.first += kTurn) {
      update_turn<kVariant, kAmsgrad, kCautious, T>(spec, row, step, ages, turn, s);
      s = {s.param + kTurn,   s.grad + kTurn,       s.copy + kTurn,
           s.exp_avg + kTurn, s.exp_avg_sq + kTurn, s.max_exp_avg_sq + kTurn};
    }
  }
}

template <typename T>
GRADDROP_FN void general_thread(const LaunchSpec& spec, int block, int num_blocks, int thread) {
  for (int64_t c = block; c < spec.num_chunks; c = next_chunk(spec, c, num_blocks)) {
    const Chunk chunk = chunk_at(spec, c);
    const StepRow step = spec.step_rows[chunk.tensor];
    if (step.flags & kSkipFlag) continue;
    const TensorRow row = spec.rows[chunk.tensor];
    const float* const ages = spec.by_age + chunk.tensor * spec.age_stride * 4;
    const int64_t end = row.numel < chunk.first + kChunk ? row.numel : chunk.first + kChunk;
#pragma unroll 1
    for (int64_t i = chunk.first + thread; i < end; i += kThreads)
      update_element<T>({spec.kind, spec.planes != 0, spec.amsgrad != 0, spec.ages != 0,
                         spec.update != 0, spec.cautious != 0}, spec, row, step, ages, i);
  }
}

}  // namespace graddrop
