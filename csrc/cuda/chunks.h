// The division of a launch's work: one block per chunk of a tensor, eight elements per thread and turn.
#pragma once
#include "thread_mask.h"

namespace graddrop {

constexpr int kThreads = 256;
constexpr int kTurn = kThreads * kElements;  // elements per block and turn

// Entry c of a launch's chunk list.
struct Chunk {
  int64_t tensor, first;  // first: element
};
GRADDROP_FN Chunk chunk_at(const LaunchSpec& spec, int64_t c) {
  const int64_t entry = spec.chunks[c];
  return {entry >> kChunkBits, (entry & ((int64_t{1} << kChunkBits) - 1)) * kChunk};
}

// A thread's first turn in a chunk. The next turn begins kTurn elements later.
GRADDROP_FN Turn first_turn(const TensorRow& row, const Chunk& chunk, int thread) {
  const int warp_offset = thread / kWarp * kWarpElements;
  const int64_t first = chunk.first + warp_offset, left = row.numel - first;
  return {first, left < kChunk - warp_offset ? static_cast<int>(left) : kChunk - warp_offset, thread % kWarp};
}

// Says to the compiler that an address read from a table is one of device memory.
GRADDROP_FN void assume_global(const void* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#else
  (void)address;
#endif
}

}  // namespace graddrop
