// The operations of PTX that the table in instructions.py names, on numbers of C++.
#pragma once
#include <cfenv>
#include <cstdint>

namespace ptx {

using s32 = int32_t;
using s64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;

#define BINARY(name, sign) \
  template <typename T>    \
  T name(T a, T b) { return a sign b; }
BINARY(add, +) BINARY(sub, -) BINARY(mul, *) BINARY(div, /)
#define COMPARISON(name, expression) \
  template <typename T>              \
  bool name(T a, T b) { return expression; }
COMPARISON(is_eq, a == b) COMPARISON(is_lt, a < b) COMPARISON(is_le, a <= b) COMPARISON(is_gt, a > b)
COMPARISON(is_ge, a >= b) COMPARISON(is_ne, a < b || a > b) COMPARISON(is_neu, a != b)  // u: or one is NaN
COMPARISON(is_gtu, !(a <= b)) COMPARISON(is_geu, !(a < b))

inline float f32(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline double f64(uint64_t bits) { return __builtin_bit_cast(double, bits); }
// Every NaN that an instruction makes is the same one.
inline uint32_t bits(float x) { return x != x ? 0x7fffffffu : __builtin_bit_cast(uint32_t, x); }
inline uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
template <typename T>
T neg(T x) { return -x; }
template <typename T>
T abs(T x) { return __builtin_signbit(x) ? -x : x; }
inline float abs_ftz(float x) { return abs(x) < 0x1p-126f ? 0 : abs(x); }  // numbers below the normal ones count as 0

// Of a NaN and a number the number, and -0 is less than 0.
template <typename T>
T min(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a < b || (a == b && __builtin_signbit(static_cast<double>(a))) ? a : b;
}
template <typename T>
T max(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a > b || (a == b && !__builtin_signbit(static_cast<double>(a))) ? a : b;
}

// Towards zero, downwards or upwards. Kernels are not optimised, so that nothing is moved out of here.
template <typename F>
auto rounded(char mode, F operation) {
  std::fesetround(mode == 'z' ? FE_TOWARDZERO : mode == 'm' ? FE_DOWNWARD : FE_UPWARD);
  const auto result = operation();
  std::fesetround(FE_TONEAREST);
  return result;
}

// The upper half of 1 / x, of an x whose lower half counts as 0: the start of a division.
inline double rcp(double x) {
  const uint64_t upper = 0xffffffff00000000u;
  return f64(bits(1.0 / f64(bits(x) & upper)) & upper);
}

template <typename F>
uint64_t both(F operation) {  // on the lower halves, then on the upper ones
  return bits(operation(0)) | static_cast<uint64_t>(bits(operation(32))) << 32;
}

template <char kMode>  // 'n' to nearest even, 'z' towards zero
uint16_t to_f16(float x) {
  static_assert(kMode == 'n');
  return x != x ? 0x7fff : __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}
template <char kMode>
uint16_t to_bf16(float x) {
  const uint32_t whole = bits(x), added = kMode == 'n' ? 0x7fff + (whole >> 16 & 1) : 0;
  return x != x ? 0x7fff : (whole + added) >> 16;
}
inline float from_f16(uint16_t x) { return __builtin_bit_cast(_Float16, x); }
inline float from_bf16(uint16_t x) { return f32(static_cast<uint32_t>(x) << 16); }

// Towards zero; what has no room becomes the nearest number that has, and NaN 0.
template <typename To>
To to(float x) {
  const To least = static_cast<To>(-1) < 0 ? static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1)) : 0;
  const To most = static_cast<To>(~least);
  if (x != x) return 0;
  return x <= static_cast<float>(least) ? least : x >= static_cast<float>(most) ? most : static_cast<To>(x);
}

// Shifts by the width or more leave nothing, or copies of the sign.
template <typename T>
T shl(T x, uint32_t by) { return by < 8 * sizeof(T) ? x << by : 0; }
template <typename T>
T shr(T x, uint32_t by) {
  const uint32_t most = 8 * sizeof(T) - 1;
  return by <= most ? x >> by : static_cast<T>(-1) < 0 ? x >> most : 0;
}

// Four bytes of b:a, each chosen by four bits of the selector; with the uppermost of these, copies of its sign.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15, byte = (choice & 4 ? b : a) >> 8 * (choice & 3) & 255;
    result |= (choice & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}
template <typename T>
T bfe(T x, uint32_t begin, uint32_t count) { return shr(x, begin & 255) & static_cast<T>(shl<T>(1, count & 255) - 1); }
inline s32 bfe_s32(s32 x, uint32_t begin, uint32_t count) {  // extended by the field's sign
  const s32 rest = shr(x, begin & 255), unused = (count & 255) < 32 ? 32 - (count & 255) : 0;
  return unused == 32 ? 0 : rest << unused >> unused;
}
template <typename T>
T bfi(T field, T x, uint32_t begin, uint32_t count) {
  const T ones = shl<T>(1, count & 255) - 1, place = shl(ones, begin & 255);
  return (x & ~place) | (shl(field, begin & 255) & place);
}

}  // namespace ptx
