// One float at a time, for any processor. Included by kernels_portable.cpp.
#pragma once
#include <cstring>

#include "../gaussian.h"
#include "../mask.h"
#include "../stochastic.h"

namespace graddrop {
namespace {

using Lanes = bool;
struct Vec {
  using LaneMask = Lanes;
  static constexpr int kWidth = 1;
  float x;
  Vec() = default;
  explicit Vec(float x) : x(x) {}
};

GRADDROP_FN Vec operator+(Vec a, Vec b) { return Vec(a.x + b.x); }
GRADDROP_FN Vec operator-(Vec a, Vec b) { return Vec(a.x - b.x); }
GRADDROP_FN Vec operator*(Vec a, Vec b) { return Vec(a.x * b.x); }
GRADDROP_FN Vec fma(Vec a, Vec b, Vec c) { return Vec(graddrop::fma(a.x, b.x, c.x)); }
GRADDROP_FN Vec div(Vec a, Vec b) { return Vec(graddrop::div(a.x, b.x)); }
GRADDROP_FN Vec sqrt(Vec a) { return Vec(graddrop::sqrt(a.x)); }
GRADDROP_FN Vec min(Vec a, Vec b) { return Vec(graddrop::min(a.x, b.x)); }
GRADDROP_FN Vec negate_fma(Vec a, Vec b, Vec c) { return Vec(graddrop::fma(-a.x, b.x, c.x)); }
GRADDROP_FN Vec max(Vec a, Vec b) { return Vec(graddrop::max(a.x, b.x)); }
GRADDROP_FN Vec where_negative(Vec x, Vec a, Vec b) { return Vec(graddrop::where_negative(x.x, a.x, b.x)); }
GRADDROP_FN Vec keep_or_zero(Lanes keep, Vec a) { return keep ? a : Vec(0.0f); }
GRADDROP_FN Vec exponent_and_mantissa(Vec y, Vec& mantissa) {
  return Vec(graddrop::exponent_and_mantissa(y.x, mantissa.x));
}
GRADDROP_FN Vec flip(Vec a, Vec sign) { return Vec(graddrop::flip(a.x, sign.x)); }
GRADDROP_FN Uniforms<Vec> load_uniforms(const uint32_t* words) {  // of a pair of words
  const Uniforms<float> u = graddrop::uniforms(words[0], words[1]);
  return {Vec(u.radius), Vec(u.angle), Vec(u.sign)};
}
GRADDROP_FN void store_pairs(float* target, Vec even, Vec odd) {
  target[0] = even.x;
  target[1] = odd.x;
}

GRADDROP_FN void load(const float* source, Vec& a) { a.x = *source; }
GRADDROP_FN void store(float* target, Vec a) { *target = a.x; }
GRADDROP_FN Vec round_stochastically(Vec a, const uint32_t* words) {
  return Vec(graddrop::round_stochastically(a.x, *words));
}
GRADDROP_FN Vec round_by_lower_half(Vec a, const uint32_t* words) {
  return Vec(graddrop::round_by_lower_half(a.x, *words));
}

// Sums of squares in float64, one per lane. The square of a float32 is exact there.
struct Squares {
  double x = 0;
};
GRADDROP_FN void add_square(Squares& sums, Vec a) { sums.x += static_cast<double>(a.x) * static_cast<double>(a.x); }
GRADDROP_FN void store(double* target, const Squares& sums) { *target = sums.x; }

struct BFloat16 {
  uint16_t bits;
};
GRADDROP_FN void load(const BFloat16* source, Vec& a) { a.x = float_of(static_cast<uint32_t>(source->bits) << 16); }
GRADDROP_FN void store(BFloat16* target, Vec a) {  // round to nearest even
  const uint32_t u = bits_of(a.x);
  target->bits = a.x != a.x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

struct Float16 {
  uint16_t bits;
};
GRADDROP_FN void load(const Float16* source, Vec& a) {
  const uint32_t sign = (source->bits & 0x8000u) << 16, magnitude = source->bits & 0x7fffu;
  if (magnitude >= 0x7c00)  // infinity or NaN
    a.x = float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00) << 22);
  else  // exponent and mantissa moved into place; the factor 2^112 corrects the bias and normalises denormals
    a.x = float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}
GRADDROP_FN void store(Float16* target, Vec a) {  // round to nearest even
  const uint32_t u = bits_of(a.x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN
  else if (magnitude >= 0x477ff000) half = 0x7c00;                        // rounds to infinity
  else if (magnitude < 0x38800000)
    // below 2^-14: adding 0.5 aligns the half's denormal step with the float's last bit, and rounds
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  else half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  target->bits = static_cast<uint16_t>(sign | half);
}

template <typename T>
GRADDROP_FN void store_kept(T* target, Lanes keep, Vec a) {
  if (keep) store(target, a);
}

GRADDROP_FN void lookup(const float* table, int64_t, const uint16_t* index, Vec& a) { a.x = table[*index]; }

// Eight Philox calls, all made at the end, since making them round by round would gain nothing.
struct Philox8 {
  uint64_t first;
  uint32_t draw, domain;
  uint64_t key;
};
GRADDROP_FN void philox_start(Philox8& s, uint64_t first, uint32_t draw, uint32_t domain) {
  s = {first, draw, domain, 0};
}
GRADDROP_FN void philox_round(Philox8& s, const PhiloxKeys& keys, int) {
  s.key = keys.k0[0] | static_cast<uint64_t>(keys.k1[0]) << 32;
}
// Natural order on a little-endian machine. Not inlined, which saves compile time and costs nothing.
static __attribute__((noinline)) void philox_finish(Philox8 s, uint32_t* words) {
  for (int call = 0; call < 8; ++call) {
    const PhiloxWords four = philox_call(s.first + call, s.draw, s.domain, s.key);
    std::memcpy(words + 4 * call, four.word, sizeof four.word);
  }
}

// The keep mask of a block of 64 elements, made from draws, buckets or bits.
struct Keep {
  uint64_t bits;
};
GRADDROP_FN void lanes_at(const Keep& keep, int i, Lanes& lanes) { lanes = keep.bits >> i & 1; }
GRADDROP_FN void keep_bits(uint64_t bits, Keep& keep) { keep.bits = bits; }
GRADDROP_FN uint64_t bits_of(const Keep& keep) { return keep.bits; }
GRADDROP_FN void keep_in_range(const uint16_t* u16, uint16_t first, uint16_t last, Keep& keep) {
  keep.bits = 0;
  for (int i = 0; i < 64; ++i) keep.bits |= static_cast<uint64_t>(first <= u16[i] && u16[i] <= last) << i;
}
GRADDROP_FN void keep_at_least(const uint16_t* u16, uint16_t threshold, Keep& keep) {
  keep_in_range(u16, threshold, 65535, keep);
}

GRADDROP_FN void to_buckets(uint16_t* u16, uint32_t buckets) {
  for (int i = 0; i < 64; ++i) u16[i] = static_cast<uint16_t>(bucket_of(u16[i], buckets));
}

GRADDROP_FN void add_plane(uint64_t bits, int plane, uint16_t* u16) {
  for (int i = 0; i < 64; ++i) u16[i] |= static_cast<uint16_t>((bits >> i & 1) << plane);
}

// The vector for rows of parameters P and moments M.
template <typename P, typename M>
struct VectorFor {
  using Type = Vec;
};

}  // namespace
}  // namespace graddrop
