// Runs the blocks of a launch in random order, and in each block the warps: up to where their lanes meet, and at a
// barrier all of them together. Looks up every access.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr uint32_t kWarp = 32;
constexpr const char* kAccess[] = {"load", "store", "atomic access"};  // by Access

using Span = std::pair<uint64_t, uint64_t>;       // begin, end
using Fault = std::pair<uint32_t, std::string>;  // number of the instruction, what is wrong

[[noreturn]] void fail(const Thread& thread, uint32_t at, const char* format, auto... values) {
  char text[300];
  std::snprintf(text, sizeof text, format, values...);
  const std::string who = " by thread " + std::to_string(thread.tid) + " of block " + std::to_string(thread.ctaid);
  throw Fault{at, text + who};
}

// The last accesses to a byte. If one of two threads writes it, there must be a barrier between them.
struct Visits {
  uint32_t writer, reader, written = 0, read = 0;  // by whom; in which epochs, which begin at 1
  bool many_readers;
};

}  // namespace

struct Block {
  const Span* spans;
  uint64_t num_spans;
  const char* parameters;
  std::vector<char> shared;
  bool meets, watched;  // watched: for accesses that a barrier should part, which takes time
  uint32_t epoch = 1;   // barriers passed
  std::unordered_map<char*, Visits> visits;
  std::vector<Thread> threads;

  char* visit(Thread& thread, char* memory, uint32_t bytes, Access access, uint32_t at, const void* stored) {
    for (uint32_t i = 0; watched && access != kAtomic && i < bytes; ++i) {
      Visits& seen = visits[memory + i];
      const bool same = stored && static_cast<const char*>(stored)[i] == memory[i];  // threads may store the same
      const bool written = seen.written == epoch && seen.writer != thread.tid && !same;
      const bool read = seen.read == epoch && (seen.many_readers || seen.reader != thread.tid);
      if (written || (access == kWrite && read))
        fail(thread, at, "no barrier between this %s and the %s of thread %u,", kAccess[access],
             kAccess[written ? kWrite : kRead], written ? seen.writer : seen.reader);
      if (access == kWrite)
        seen.writer = thread.tid, seen.written = epoch;
      else
        seen.many_readers = read, seen.reader = thread.tid, seen.read = epoch;
    }
    if (stored) std::memcpy(memory, stored, bytes);
    return memory;
  }
};

char* Thread::global(uint64_t address, uint32_t bytes, Access access, uint32_t at, const void* stored) {
  const Span *const first = block->spans, *const last = first + block->num_spans;
  const Span* next = std::upper_bound(first, last, address, [](uint64_t a, const Span& b) { return a < b.first; });
  if (next == first) fail(*this, at, "%s of %u bytes before every tensor", kAccess[access], bytes);
  if (address + bytes > next[-1].second)
    fail(*this, at, "%s of %u bytes, %lld bytes after the end of the tensor before it,", kAccess[access], bytes,
         static_cast<long long>(address - next[-1].second));
  if (address % bytes) fail(*this, at, "misaligned %s of %u bytes", kAccess[access], bytes);
  return block->visit(*this, reinterpret_cast<char*>(address), bytes, access, at, stored);
}

char* Thread::shared(uint32_t offset, uint32_t bytes, Access access, uint32_t at, const void* stored) {
  if (offset % bytes || uint64_t{offset} + bytes > block->shared.size())
    fail(*this, at, "%s of %u bytes at %u of %zu bytes of shared memory", kAccess[access], bytes, offset,
         block->shared.size());
  return block->visit(*this, block->shared.data() + offset, bytes, access, at, stored);
}

void Thread::exchange(uint32_t lanes_apart, uint32_t clamp, uint32_t members, uint32_t at) {
  if (clamp != kWarp - 1 || members != ~0u) fail(*this, at, "a shuffle of a part of a warp");
  source = (tid ^ lanes_apart) % kWarp;
}

namespace {

using Kernel = void (*)(Thread&, char* registers, const char* parameters);

bool together(const Thread& a, const Thread& b) { return a.stop == b.stop && a.instruction == b.instruction; }

// Runs the lanes of a warp until all wait at a barrier, or are done.
void run_warp(Block& block, uint32_t begin, Kernel kernel, char* registers, uint64_t stride, std::mt19937_64& random) {
  Thread* const lanes = &block.threads[begin];
  uint32_t order[kWarp];
  const uint32_t count = std::min<uint32_t>(kWarp, block.threads.size() - begin);
  for (uint32_t i = 0; i < count; ++i) order[i] = i;
  for (;;) {
    if (block.meets) std::shuffle(order, order + count, random);
    for (uint32_t i = 0; i < count; ++i)
      kernel(lanes[order[i]], registers + (begin + order[i]) * stride, block.parameters);
    for (uint32_t i = 1; i < count; ++i)
      if (!together(lanes[i], lanes[0]))
        fail(lanes[i], lanes[lanes[i].stop == kDone ? 0 : i].instruction, "the lanes of a warp do not meet here: left");
    if (lanes[0].stop == kBarrier || lanes[0].stop == kDone) return;
    if (lanes[0].stop == kStep && block.threads.size() <= kWarp) ++block.epoch;
    if (lanes[0].stop == kShuffle) {
      uint32_t values[kWarp];
      for (uint32_t i = 0; i < count; ++i) values[i] = lanes[i].value;
      for (uint32_t i = 0; i < count; ++i) lanes[i].value = values[lanes[i].source];
    }
  }
}

void run_block(Block& block, Kernel kernel, char* registers, uint64_t stride, std::mt19937_64& random) {
  std::vector<uint32_t> warps;
  for (uint32_t begin = 0; begin < block.threads.size(); begin += kWarp) warps.push_back(begin);
  Thread& first = block.threads[0];
  do {
    std::shuffle(warps.begin(), warps.end(), random);
    for (uint32_t begin : warps) run_warp(block, begin, kernel, registers, stride, random);
    bool any = false, all = true;
    for (Thread& thread : block.threads) {
      if (!together(thread, first))
        fail(thread, (thread.stop == kDone ? first : thread).instruction, "the warps of a block do not meet: left");
      any |= thread.value != 0, all &= thread.value != 0;
    }
    for (Thread& thread : block.threads) thread.value = thread.any ? any : all;
    ++block.epoch;
  } while (first.stop != kDone);
}

}  // namespace

// Runs a launch. Returns 0, or 1 with what is wrong and the number of the instruction.
extern "C" int ptx_launch(Kernel kernel, uint64_t register_bytes, const char* parameters, const Span* spans,
                          uint64_t num_spans, uint32_t num_blocks, uint32_t num_threads, uint32_t shared_bytes,
                          int meets, uint64_t seed, char* message, uint64_t message_bytes, uint32_t* instruction) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> order(num_blocks);
  for (uint32_t i = 0; i < num_blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  // Threads that do not meet run one after another, in the same registers.
  const uint64_t stride = meets ? register_bytes : 0;
  std::vector<char> registers(meets ? num_threads * register_bytes : register_bytes);
  try {
    for (uint32_t i : order) {
      Block block{spans, num_spans, parameters, std::vector<char>(shared_bytes), meets != 0,
                  meets || num_threads <= kWarp};
      // What is not written yet is not zero.
      const char rest = static_cast<char>(random());
      std::memset(registers.data(), rest, registers.size());
      std::fill(block.shared.begin(), block.shared.end(), rest);
      for (uint32_t tid = 0; tid < num_threads; ++tid)
        block.threads.push_back({tid, i, num_threads, num_blocks, &block});
      run_block(block, kernel, registers.data(), stride, random);
    }
  } catch (const Fault& fault) {
    std::snprintf(message, message_bytes, "%s", fault.second.c_str());
    *instruction = fault.first;
    return 1;
  }
  return 0;
}
