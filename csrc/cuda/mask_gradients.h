// Masks the gradients of a launch in place, and does nothing else: for other optimizers.
#pragma once
#include "chunks.h"
#include "storage.h"

namespace graddrop {

template <typename G>
GRADDROP_FN G* written_gradients_of(const TensorRow& row) {
  assume_global(row.grad);
  return static_cast<G*>(const_cast<void*>(row.grad));
}

template <typename G>
GRADDROP_FN void mask_element(int32_t kind, bool planes, const TensorRow& row, const StepRow& step, int64_t i) {
  const ElementMask mask = element_mask(kind, planes, row, step, i);
  G* const grad = written_gradients_of<G>(row) + i;
  narrow(mask.keep ? masked_gradient(widen(*grad), step, mask, false) : 0.0f, *grad);
}

// A thread's elements in chunk number `block`. All loads come before the first mask, so that a thread waits for memory
// once. A launch of kind kKeep holds dropped blocks only.
template <Variant kVariant, typename G>
GRADDROP_FN void aligned_masks(const LaunchSpec& spec, int block, int thread) {
  constexpr int kVector = 16 / sizeof(G), kGroups = kElements / kVector, kTurns = kChunk / kTurn;
  const Chunk chunk = chunk_at(spec, block);
  const StepRow step = spec.step_rows[chunk.tensor];
  const TensorRow row = spec.rows[chunk.tensor];
  const Turn first = first_turn(row, chunk, thread);
  G* const grad = written_gradients_of<G>(row) + first.first + group_offset<kVector>(first.lane, 0);

  Group<G, kVector> in[kTurns * kGroups];
#pragma unroll
  for (int i = 0; i < kTurns * kGroups; ++i) {
    const int turn = i / kGroups * kTurn, group = i % kGroups;
    in[i] = {};
    if (kVariant != kPlain && turn + group_offset<kVector>(first.lane, group) + kVector <= first.left)
      load(in[i], grad + turn + group_offset<kVector>(0, group));
  }

#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const Turn turn = {first.first + t * kTurn, first.left - t * kTurn, first.lane};
    if (turn.left <= 0) break;
    ThreadMask mask;
    make_mask<kVariant, kVector>(row, step, turn, mask);
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      uint32_t* const words = &in[t * kGroups + e / kVector].word[e % kVector / 2 * Group<G, kVector>::kWordsAPair];
      float g[2];
      unpack(words, g[0], g[1], G{});
#pragma unroll
      for (int j = 0; j < 2; ++j) g[j] = masked_gradient<kVariant>(g[j], step, mask, e + j);
      merge(words, g[0], g[1], true, true, G{});
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (group_offset<kVector>(turn.lane, group) + kVector <= turn.left)
        store(grad + t * kTurn + group_offset<kVector>(0, group), in[t * kGroups + group]);
  }

  const int64_t end_of_groups = row.numel / kVector * kVector;  // the few elements after it are done one by one
  if (chunk.first + kChunk > end_of_groups && end_of_groups + thread < row.numel)
    mask_element<G>(kind_of(kVariant), reads_bits(kVariant), row, step, end_of_groups + thread);
}

// The same for a row of any layout and alignment.
template <typename G>
GRADDROP_FN void general_masks(const LaunchSpec& spec, int block, int thread) {
  const Chunk chunk = chunk_at(spec, block);
  const StepRow step = spec.step_rows[chunk.tensor];
  const TensorRow row = spec.rows[chunk.tensor];
  const int64_t end = row.numel < chunk.first + kChunk ? row.numel : chunk.first + kChunk;
#pragma unroll 1
  for (int64_t i = chunk.first + thread; i < end; i += kThreads)
    mask_element<G>(spec.kind, spec.planes != 0, row, step, i);
}

}  // namespace graddrop
