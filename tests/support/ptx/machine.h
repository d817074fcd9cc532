// What translated kernels run on: a thread that stops where it meets others, checked memory, and the operations that C++
// does not have. Includes little, since every kernel is compiled with it.
#pragma once
#include <cstdint>

enum Access { kRead, kWrite, kAtomic };
enum Stop { kBegin, kShuffle, kBarrier, kStep, kDone };  // kStep: the warp is in step at a store

struct Block;

struct Thread {
  uint32_t tid, ctaid, ntid, nctaid;
  Block* block;
  // A kernel is a function that is called again after every stop, and goes on at `instruction`. It leaves `value`, and
  // finds there what others have.
  Stop stop;
  uint32_t instruction, value, source_lane;
  bool any;  // of a barrier with a predicate: whether any thread's is true, else whether all are

  void exchange(uint32_t lanes_apart, uint32_t clamp, uint32_t members, uint32_t at);  // before it meets for it
  void meet(Stop why, uint32_t at, uint32_t with = 0) { stop = why, instruction = at, value = with; }

  // The host's address of the bytes, if the thread may have them. Else throws what is wrong.
  char* global(uint64_t address, uint32_t bytes, Access access, uint32_t at);
  char* shared(uint32_t offset, uint32_t bytes, Access access, uint32_t at);
  char* parameter(uint64_t address, uint32_t bytes, uint32_t at);
};

// Of "r(ound)z(ero)", m(inus), p(lus): 'z', 'm', 'p'. operation: one of + - * / f(ma) s(qrt).
float rounded(char mode, char operation, float a, float b, float c);
double rounded(char mode, char operation, double a, double b, double c);

#define GRADDROP_INLINE static inline __attribute__((unused))

GRADDROP_INLINE float f32(uint32_t bits) { return __builtin_bit_cast(float, bits); }
GRADDROP_INLINE double f64(uint64_t bits) { return __builtin_bit_cast(double, bits); }
// Every NaN that an instruction makes is the same one.
GRADDROP_INLINE uint32_t bits(float x) { return x != x ? 0x7fffffffu : __builtin_bit_cast(uint32_t, x); }
GRADDROP_INLINE uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }

GRADDROP_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GRADDROP_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
GRADDROP_INLINE float root(float x) { return __builtin_sqrtf(x); }
GRADDROP_INLINE double root(double x) { return __builtin_sqrt(x); }

// A NaN beside a number is left out, and -0 is less than 0.
template <typename T>
GRADDROP_INLINE T minimum(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
template <typename T>
GRADDROP_INLINE T maximum(T a, T b) {
  return -minimum(-a, -b);
}

GRADDROP_INLINE float flushed_magnitude(float x) {  // numbers below the normal ones become 0
  const float magnitude = __builtin_fabsf(x);
  return magnitude < 0x1p-126f ? 0 : magnitude;
}

// The upper half of 1 / x, of an x whose lower half counts as zero: the start of a division.
GRADDROP_INLINE double reciprocal(double x) {
  const uint64_t upper = 0xffffffff00000000u;
  return f64(bits(1.0 / f64(bits(x) & upper)) & upper);
}

GRADDROP_INLINE uint32_t low(uint64_t pair) { return static_cast<uint32_t>(pair); }
GRADDROP_INLINE uint32_t high(uint64_t pair) { return static_cast<uint32_t>(pair >> 32); }
GRADDROP_INLINE uint64_t pair(uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; }

GRADDROP_INLINE float from_half(uint16_t x) { return __builtin_bit_cast(_Float16, x); }
GRADDROP_INLINE uint16_t to_half(float x, char mode) {
  if (x != x) return 0x7fff;
  _Float16 near = static_cast<_Float16>(x);
  uint16_t found = __builtin_bit_cast(uint16_t, near);
  const bool beyond = __builtin_fabsf(static_cast<float>(near)) > __builtin_fabsf(x);
  return found - (mode == 'z' && beyond);
}
GRADDROP_INLINE float from_brain(uint16_t x) { return f32(static_cast<uint32_t>(x) << 16); }
GRADDROP_INLINE uint16_t to_brain(float x, char mode) {
  if (x != x) return 0x7fff;
  const uint32_t whole = bits(x);
  return (mode == 'z' ? whole : whole + 0x7fff + (whole >> 16 & 1)) >> 16;
}

// Towards zero; what has no room becomes the nearest number that has, and NaN 0.
template <typename To, typename From>
GRADDROP_INLINE To to_integer(From x) {
  const To least = static_cast<To>(-1) < 0 ? static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1)) : 0;
  const To most = static_cast<To>(~least);
  if (x != x) return 0;
  if (x <= static_cast<From>(least)) return least;
  if (x >= static_cast<From>(most)) return most;
  return static_cast<To>(x);
}

// Shifts by the width or more leave nothing, or copies of the sign.
template <typename T>
GRADDROP_INLINE T shifted_left(T x, uint32_t by) {
  return by < 8 * sizeof(T) ? x << by : 0;
}
template <typename T>
GRADDROP_INLINE T shifted_right(T x, uint32_t by) {
  const uint32_t most = 8 * sizeof(T) - 1;
  return by <= most ? x >> by : static_cast<T>(-1) < 0 ? x >> most : 0;
}

// Four bytes of b:a, each chosen by four bits of the selector; with the uppermost of these, copies of its sign.
GRADDROP_INLINE uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15, byte = pair(a, b) >> 8 * (choice & 7) & 255;
    result |= (choice & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}

GRADDROP_INLINE uint32_t field(uint32_t x, uint32_t begin, uint32_t length) {
  begin &= 255, length &= 255;
  const uint32_t rest = shifted_right(x, begin);
  return length < 32 ? rest & ((1u << length) - 1) : rest;
}

GRADDROP_INLINE uint32_t with_field(uint32_t inserted, uint32_t x, uint32_t begin, uint32_t length) {
  begin &= 255, length &= 255;
  const uint32_t mask = shifted_left(length < 32 ? (1u << length) - 1 : ~0u, begin);
  return (x & ~mask) | (shifted_left(inserted, begin) & mask);
}
