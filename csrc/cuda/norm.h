// The sum of the squares of a launch's gradients in float64, before or after their masks. Each thread adds up its part
// of a chunk; then the sums of threads are added up, and then those of blocks. The order is fixed, so that the same
// gradients give the same bits. The host can run it thread after thread, barrier by barrier (norm.cu), as the tests do.
#pragma once
#include "chunks.h"
#include "storage.h"

namespace graddrop {

constexpr int kTurns = kChunk / kTurn;
constexpr int kAdded = 16;  // sums that a thread adds up between two barriers
static_assert(kAdded * kAdded == kThreads, "two rounds make one sum of a block's");

// The slots to which blocks write their sums, and the address to which the last block of a norm writes the total.
struct Places {
  double* sums;       // one per block
  unsigned* arrived;  // blocks that have written their sum; 0 before the first launch and after the last
  double* out;
  int64_t first, total;  // slot of this launch's first block; number of blocks of all launches
};

GRADDROP_FN double add_square(double sum, float g) {  // the square of a float32 is exact in float64
#if defined(__CUDA_ARCH__)
  return __fma_rn(g, g, sum);
#else
  return sum + static_cast<double>(g) * g;
#endif
}

// The StepRow that the prologue made for the next step. Before the mask there may be none, and every element counts.
GRADDROP_FN StepRow step_of(const LaunchSpec& spec, bool masked, int64_t tensor) {
  if (masked) return spec.step_rows[tensor];
  StepRow step = {};
  step.factor = 1.0f;
  return step;
}

template <typename G>
GRADDROP_FN const G* gradients_of(const TensorRow& row) {
  assume_global(row.grad);
  return static_cast<const G*>(row.grad);
}

template <typename G>
GRADDROP_FN double add_element(double squares, int32_t kind, bool planes, const TensorRow& row, const StepRow& step,
                               int64_t i) {
  const ElementMask mask = element_mask(kind, planes, row, step, i);
  return mask.keep ? add_square(squares, masked_gradient(widen(gradients_of<G>(row)[i]), step, mask, false)) : squares;
}

// The sum of the squares of a thread's elements in chunk number `block`. All loads come before the first mask, so that
// a thread waits for memory once.
template <Variant kVariant, typename G>
GRADDROP_FN double aligned_squares(const LaunchSpec& spec, bool masked, int block, int thread) {
  constexpr int kVector = 16 / sizeof(G), kGroups = kElements / kVector;
  const Chunk chunk = chunk_at(spec, block);
  const StepRow step = step_of(spec, kVariant != kPlain || masked, chunk.tensor);
  if (step.flags & kOffFlag) return 0.0;
  const TensorRow row = spec.rows[chunk.tensor];
  const Turn first = first_turn(row, chunk, thread);
  const G* const grad = gradients_of<G>(row) + first.first + group_offset<kVector>(first.lane, 0);

  Group<G, kVector> in[kTurns * kGroups];
#pragma unroll
  for (int i = 0; i < kTurns * kGroups; ++i) {
    const int turn = i / kGroups * kTurn, group = i % kGroups;
    in[i] = {};
    if (turn + group_offset<kVector>(first.lane, group) + kVector <= first.left)
      load(in[i], grad + turn + group_offset<kVector>(0, group));
  }

  double squares = 0.0;
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const Turn turn = {first.first + t * kTurn, first.left - t * kTurn, first.lane};
    if (turn.left <= 0) break;
    ThreadMask mask;
    make_mask<kVariant, kVector>(row, step, turn, mask);
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      float g[2];
      unpack(&in[t * kGroups + e / kVector].word[e % kVector / 2 * Group<G, kVector>::kWordsAPair], g[0], g[1], G{});
#pragma unroll
      for (int j = 0; j < 2; ++j)
        squares = add_square(squares, masked_gradient<kVariant>(g[j], step, mask, e + j));
    }
  }

  const int64_t end_of_groups = row.numel / kVector * kVector;  // the few elements after it are done one by one
  if (chunk.first + kChunk > end_of_groups && end_of_groups + thread < row.numel)
    squares = add_element<G>(squares, kind_of(kVariant), reads_bits(kVariant), row, step, end_of_groups + thread);
  return squares;
}

// The same for a row of any layout and alignment.
template <typename G>
GRADDROP_FN double general_squares(const LaunchSpec& spec, bool masked, int block, int thread) {
  const Chunk chunk = chunk_at(spec, block);
  const StepRow step = step_of(spec, masked, chunk.tensor);
  if (step.flags & kOffFlag) return 0.0;
  const TensorRow row = spec.rows[chunk.tensor];
  const int64_t end = row.numel < chunk.first + kChunk ? row.numel : chunk.first + kChunk;
  double squares = 0.0;
#pragma unroll 1
  for (int64_t i = chunk.first + thread; i < end; i += kThreads)
    squares = add_element<G>(squares, spec.kind, spec.planes != 0, row, step, i);
  return squares;
}

// One round of additions. Of the first kAdded * adders sums each adder takes those that are `adders` apart.
GRADDROP_FN void add_up(double* sums, int adders, int thread) {
  if (thread >= adders) return;
  double sum = sums[thread];
#pragma unroll
  for (int i = 1; i < kAdded; ++i) sum += sums[thread + i * adders];
  sums[thread] = sum;
}

GRADDROP_FN double sum_at(const double* place) {
#if defined(__CUDA_ARCH__)
  return __ldcg(place);  // written by another multiprocessor: bypass L1, which may hold an older value
#else
  return *place;
#endif
}

// The part of all blocks' sums that one thread of the last block adds up, with eight loads at a time.
GRADDROP_FN double sum_of_places(const Places& places, int thread) {
  double sum = 0.0;
#pragma unroll 1
  for (int64_t begin = thread; begin < places.total; begin += 8 * kThreads) {
#pragma unroll
    for (int64_t place = begin; place < begin + 8 * kThreads; place += kThreads)
      sum += place < places.total ? sum_at(places.sums + place) : 0.0;
  }
  return sum;
}

}  // namespace graddrop
