// What translated kernels run on: threads that stop where they meet, and memory whose every access is checked.
#pragma once
#include "operations.h"

enum Access { kRead, kWrite, kAtomic };
enum Stop { kBegin, kShuffle, kBarrier, kStep, kDone };  // kStep: the warp is in step at a store

struct Block;

// A kernel is a function that is called again after every stop, and goes on at `instruction`. It leaves `value` when it
// stops, and then finds there what it gets from others.
struct Thread {
  uint32_t tid, ctaid, ntid, nctaid;
  Block* block;
  Stop stop = kBegin;
  uint32_t instruction = 0, value = 0;
  uint32_t source = 0;  // of a shuffle: the lane whose value it gets
  bool any = false;     // of a barrier with a predicate: whether any thread's is true, else whether all are

  void meet(Stop why, uint32_t at, uint32_t with = 0) { stop = why, instruction = at, value = with; }
  void exchange(uint32_t lanes_apart, uint32_t clamp, uint32_t members, uint32_t at);  // before it meets for it

  // The host's address of the bytes, if the thread may have them. Else throws what is wrong. Stores what it is given.
  char* global(uint64_t address, uint32_t bytes, Access access, uint32_t at, const void* stored = nullptr);
  char* shared(uint32_t offset, uint32_t bytes, Access access, uint32_t at, const void* stored = nullptr);
};
