// 8 floats in an AVX2 register, and the masks made in it. Included by kernels_avx2.cpp.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../gaussian.h"
#include "../mask.h"

namespace graddrop {
namespace {

struct Lanes {  // all ones where kept
  __m256i x;
};
struct Vec {
  using LaneMask = Lanes;
  static constexpr int kWidth = 8;
  __m256 x;
  Vec() = default;
  explicit Vec(__m256 x) : x(x) {}
  explicit Vec(float value) : x(_mm256_set1_ps(value)) {}
};

GRADDROP_FN Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.x, b.x)); }
GRADDROP_FN Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.x, b.x)); }
GRADDROP_FN Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.x, b.x)); }
GRADDROP_FN Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec div(Vec a, Vec b) { return Vec(_mm256_div_ps(a.x, b.x)); }
GRADDROP_FN Vec sqrt(Vec a) { return Vec(_mm256_sqrt_ps(a.x)); }
GRADDROP_FN Vec min(Vec a, Vec b) { return Vec(_mm256_min_ps(a.x, b.x)); }
GRADDROP_FN Vec negate_fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fnmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.x, b.x)); }
GRADDROP_FN Vec where_negative(Vec x, Vec a, Vec b) {  // compared: blendv alone would take -0 for negative
  return Vec(_mm256_blendv_ps(b.x, a.x, _mm256_cmp_ps(x.x, _mm256_setzero_ps(), _CMP_LT_OQ)));
}
GRADDROP_FN Vec keep_or_zero(Lanes keep, Vec a) { return Vec(_mm256_and_ps(_mm256_castsi256_ps(keep.x), a.x)); }
GRADDROP_FN Vec select(Lanes keep, Vec yes, Vec no) {
  return Vec(_mm256_blendv_ps(no.x, yes.x, _mm256_castsi256_ps(keep.x)));
}
GRADDROP_FN Vec exponent_and_mantissa(Vec y, Vec& mantissa) {
  const __m256i sqrt_half = _mm256_set1_epi32(0x3f3504f3);
  const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(y.x), sqrt_half);
  mantissa.x = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(0x7fffff)), sqrt_half));
  return Vec(_mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 23)));
}
GRADDROP_FN Vec flip(Vec a, Vec sign) { return Vec(_mm256_xor_ps(a.x, sign.x)); }
// Of 8 pairs of words, in an order that store_pairs() undoes.
GRADDROP_FN Uniforms<Vec> load_uniforms(const uint32_t* words) {
  const float* floats = reinterpret_cast<const float*>(words);
  const __m256 low = _mm256_loadu_ps(floats), high = _mm256_loadu_ps(floats + 8);
  const __m256i first = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
  const __m256i second = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));
  const __m256i one = _mm256_set1_epi32(0x3f800000), sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  const __m256i angle = _mm256_and_si256(_mm256_srli_epi32(second, 8), _mm256_set1_epi32(0x7fffff));
  return {Vec(_mm256_castsi256_ps(_mm256_or_si256(_mm256_srli_epi32(first, 9), one))),
          Vec(_mm256_castsi256_ps(_mm256_or_si256(angle, one))), Vec(_mm256_castsi256_ps(_mm256_and_si256(second, sign)))};
}
GRADDROP_FN void store_pairs(float* target, Vec even, Vec odd) {
  const __m256 low = _mm256_unpacklo_ps(even.x, odd.x), high = _mm256_unpackhi_ps(even.x, odd.x);
  _mm256_storeu_ps(target, low);
  _mm256_storeu_ps(target + 8, high);
}

// As in csrc/stochastic.h, for 8 floats and their random words: by the half that lies in the lower 16 bits of `halves`.
GRADDROP_FN Vec round_by(Vec a, __m256i halves) {
  const __m256i u = _mm256_castps_si256(a.x), exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i special = _mm256_cmpeq_epi32(_mm256_and_si256(u, exponent), exponent);
  const __m256i sum = _mm256_add_epi32(u, halves);
  const __m256i rounded = _mm256_and_si256(sum, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return Vec(_mm256_castsi256_ps(_mm256_blendv_epi8(rounded, u, special)));
}
GRADDROP_FN __m256i load_words(const uint32_t* words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}
GRADDROP_FN Vec round_stochastically(Vec a, const uint32_t* words) {
  return round_by(a, _mm256_srli_epi32(load_words(words), 16));
}
GRADDROP_FN __m256i lower_halves(__m256i words) { return _mm256_and_si256(words, _mm256_set1_epi32(0xffff)); }
GRADDROP_FN Vec round_by_lower_half(Vec a, const uint32_t* words) {
  return round_by(a, lower_halves(load_words(words)));
}

// Sums of squares in float64, one per lane. The square of a float32 is exact there.
struct Squares {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
};
GRADDROP_FN void add_square(Squares& sums, Vec a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.x)),
                high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.x, 1));
  sums.low = _mm256_fmadd_pd(low, low, sums.low);
  sums.high = _mm256_fmadd_pd(high, high, sums.high);
}
GRADDROP_FN void store(double* target, const Squares& sums) {
  _mm256_storeu_pd(target, sums.low);
  _mm256_storeu_pd(target + 4, sums.high);
}

GRADDROP_FN __m128i to_half_lanes(Lanes keep) {  // 8 lanes of 32 bits -> 8 lanes of 16 bits
  return _mm_packs_epi32(_mm256_castsi256_si128(keep.x), _mm256_extracti128_si256(keep.x, 1));
}
GRADDROP_FN void store_half_kept(uint16_t* target, Lanes keep, __m128i a) {
  __m128i* wide = reinterpret_cast<__m128i*>(target);
  _mm_storeu_si128(wide, _mm_blendv_epi8(_mm_loadu_si128(wide), a, to_half_lanes(keep)));
}

GRADDROP_FN void load(const float* source, Vec& a) { a.x = _mm256_loadu_ps(source); }
GRADDROP_FN void store(float* target, Vec a) { _mm256_storeu_ps(target, a.x); }
// Stores old and new bits blended, all at once: masked stores are many times slower on AMD processors.
GRADDROP_FN void store_kept(float* target, Lanes keep, Vec a) {
  store(target, select(keep, a, Vec(_mm256_loadu_ps(target))));
}

struct BFloat16 {
  uint16_t bits;
};
GRADDROP_FN void load(const BFloat16* source, Vec& a) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  a.x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
GRADDROP_FN __m256i round_to_bfloat16(Vec a) {  // to nearest even, in the upper half of each lane; not for NaN
  const __m256i u = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
GRADDROP_FN __m256i with_nan(Vec a, __m256i rounded) {
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                            _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q)));
}
GRADDROP_FN __m128i to_bfloat16(Vec a) {
  const __m256i rounded = _mm256_srli_epi32(with_nan(a, round_to_bfloat16(a)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
GRADDROP_FN void store(BFloat16* target, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_bfloat16(a));
}
GRADDROP_FN void store_kept(BFloat16* target, Lanes keep, Vec a) {
  store_half_kept(&target->bits, keep, to_bfloat16(a));
}

struct Float16 {
  uint16_t bits;
};
GRADDROP_FN void load(const Float16* source, Vec& a) {
  a.x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
GRADDROP_FN __m128i to_float16(Vec a) { return _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GRADDROP_FN void store(Float16* target, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_float16(a)); }
GRADDROP_FN void store_kept(Float16* target, Lanes keep, Vec a) { store_half_kept(&target->bits, keep, to_float16(a)); }

// table[index] for 8 indices. Tables of up to 8 and 16 entries (allocated as such) are shuffled from registers. Longer
// ones are gathered.
GRADDROP_FN void lookup(const float* table, int64_t size, __m256i index, Vec& a) {
  if (size > 16) {
    a.x = _mm256_i32gather_ps(table, index, 4);
    return;
  }
  a.x = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  if (size <= 8) return;
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  a.x = _mm256_blendv_ps(a.x, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 into the sign
}
GRADDROP_FN void lookup(const float* table, int64_t size, const uint16_t* index, Vec& a) {
  lookup(table, size, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))), a);
}

// Eight Philox calls in progress, as in simd_avx512.h, with 4 calls per register.
struct Philox8 {
  __m256i a[2], b[2], c[2], d[2];
};
GRADDROP_FN void philox_start(Philox8& s, uint64_t first, uint32_t draw, uint32_t domain) {
  for (int u = 0; u < 2; ++u) {
    s.a[u] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + 4 * u)), _mm256_setr_epi64x(0, 2, 1, 3));
    s.b[u] = _mm256_srli_epi64(s.a[u], 32);
    s.c[u] = _mm256_set1_epi64x(draw);
    s.d[u] = _mm256_set1_epi64x(domain);
  }
}
GRADDROP_FN void philox_round(Philox8& s, const PhiloxKeys& keys, int round) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i key0 = _mm256_set1_epi32(static_cast<int>(keys.k0[round])),
                key1 = _mm256_set1_epi32(static_cast<int>(keys.k1[round]));
  for (int u = 0; u < 2; ++u) {
    const __m256i product0 = _mm256_mul_epu32(s.a[u], m0), product1 = _mm256_mul_epu32(s.c[u], m1);
    s.a[u] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), s.b[u]), key0);
    s.c[u] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), s.d[u]), key1);
    s.b[u] = product1;
    s.d[u] = product0;
  }
}
GRADDROP_FN void philox_finish(const Philox8& s, uint32_t* words) {
  for (int u = 0; u < 2; ++u) {
    const __m256i xy = _mm256_blend_epi32(s.a[u], _mm256_slli_epi64(s.b[u], 32), 0xAA);
    const __m256i zw = _mm256_blend_epi32(s.c[u], _mm256_slli_epi64(s.d[u], 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 16 * u), _mm256_unpacklo_epi64(xy, zw));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 16 * u + 8), _mm256_unpackhi_epi64(xy, zw));
  }
}

GRADDROP_FN __m256i load_u16(const uint16_t* u16) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(u16)); }

GRADDROP_FN void store_u16(uint16_t* u16, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(u16), a); }

// The keep mask of a block of 64 elements, made from draws, buckets or bits. It has 16 ones or zeros per element, which
// one instruction widens to 32.
struct Keep {
  alignas(32) uint16_t lanes[64];
};
GRADDROP_FN void lanes_at(const Keep& keep, int i, Lanes& lanes) {
  lanes.x = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep.lanes + i)));
}
GRADDROP_FN void keep_bits(uint64_t bits, Keep& keep) {
  const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int i = 0; i < 64; i += 16)
    store_u16(keep.lanes + i,
              _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits >> i)), each), each));
}
GRADDROP_FN uint64_t bits_of(const Keep& keep) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 32) {
    const __m256i bytes = _mm256_packs_epi16(load_u16(keep.lanes + i), load_u16(keep.lanes + i + 16));
    const __m256i in_order = _mm256_permute4x64_epi64(bytes, 0xd8);  // packs works on each half of a register
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(in_order))) << i;
  }
  return bits;
}
GRADDROP_FN void keep_at_least(const uint16_t* u16, uint16_t threshold, Keep& keep) {
  const __m256i thresholds = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  for (int i = 0; i < 64; i += 16) {
    const __m256i draws = load_u16(u16 + i);
    // a >= b is max(a, b) == a
    store_u16(keep.lanes + i, _mm256_cmpeq_epi16(_mm256_max_epu16(draws, thresholds), draws));
  }
}
GRADDROP_FN void keep_in_range(const uint16_t* u16, uint16_t first, uint16_t last, Keep& keep) {
  const __m256i firsts = _mm256_set1_epi16(static_cast<int16_t>(first)),
                spans = _mm256_set1_epi16(static_cast<int16_t>(last - first));
  for (int i = 0; i < 64; i += 16) {
    const __m256i above = _mm256_sub_epi16(load_u16(u16 + i), firsts);
    store_u16(keep.lanes + i, _mm256_cmpeq_epi16(_mm256_min_epu16(above, spans), above));
  }
}

// u16[i] = (u16[i] * buckets) >> 16 for 64 elements.
GRADDROP_FN void to_buckets(uint16_t* u16, uint32_t buckets) {
  for (int i = 0; i < 64; i += 16)
    store_u16(u16 + i, _mm256_mulhi_epu16(load_u16(u16 + i), _mm256_set1_epi16(static_cast<int16_t>(buckets))));
}

// u16[i] |= bit i << plane for 64 elements.
GRADDROP_FN void add_plane(uint64_t bits, int plane, uint16_t* u16) {
  const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  const __m256i value = _mm256_set1_epi16(static_cast<int16_t>(1 << plane));
  for (int i = 0; i < 64; i += 16) {
    const __m256i set =
        _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits >> i)), each), each);
    store_u16(u16 + i, _mm256_or_si256(load_u16(u16 + i), _mm256_and_si256(set, value)));
  }
}

// Two registers, for rows whose tensors all hold 16 bits per element, so that a whole register of memory is used at a
// time. a holds the elements 0, 2, 4, ..., b the elements 1, 3, 5, .... These are the lower and the upper halves of
// 32-bit lanes, so that widening costs one instruction each.
struct Lanes2 {
  Lanes a, b;
  __m256i both;  // 16 bits per element, in order
};
struct Vec2 {
  using LaneMask = Lanes2;
  static constexpr int kWidth = 2 * Vec::kWidth;
  Vec a, b;
  Vec2() = default;
  Vec2(Vec a, Vec b) : a(a), b(b) {}
  explicit Vec2(float value) : a(value), b(value) {}
};
GRADDROP_FN Vec2 operator+(Vec2 x, Vec2 y) { return {x.a + y.a, x.b + y.b}; }
GRADDROP_FN Vec2 operator-(Vec2 x, Vec2 y) { return {x.a - y.a, x.b - y.b}; }
GRADDROP_FN Vec2 operator*(Vec2 x, Vec2 y) { return {x.a * y.a, x.b * y.b}; }
GRADDROP_FN Vec2 fma(Vec2 x, Vec2 y, Vec2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
GRADDROP_FN Vec2 negate_fma(Vec2 x, Vec2 y, Vec2 z) { return {negate_fma(x.a, y.a, z.a), negate_fma(x.b, y.b, z.b)}; }
GRADDROP_FN Vec2 div(Vec2 x, Vec2 y) { return {div(x.a, y.a), div(x.b, y.b)}; }
GRADDROP_FN Vec2 sqrt(Vec2 x) { return {sqrt(x.a), sqrt(x.b)}; }
GRADDROP_FN Vec2 min(Vec2 x, Vec2 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
GRADDROP_FN Vec2 max(Vec2 x, Vec2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
GRADDROP_FN Vec2 where_negative(Vec2 x, Vec2 y, Vec2 z) {
  return {where_negative(x.a, y.a, z.a), where_negative(x.b, y.b, z.b)};
}
GRADDROP_FN Vec2 keep_or_zero(Lanes2 keep, Vec2 x) { return {keep_or_zero(keep.a, x.a), keep_or_zero(keep.b, x.b)}; }

GRADDROP_FN void load(const float* source, Vec2& x) {
  const __m256 low = _mm256_loadu_ps(source), high = _mm256_loadu_ps(source + 8);
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88)),
                odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));
  x.a.x = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xD8));
  x.b.x = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xD8));
}
// By one half of each of 16 words in memory's order: packed, even ones are low and odd ones high.
GRADDROP_FN Vec2 round_by(Vec2 x, __m256i first, __m256i second) {
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
  return {round_by(x.a, lower_halves(halves)), round_by(x.b, _mm256_srli_epi32(halves, 16))};
}
GRADDROP_FN Vec2 round_stochastically(Vec2 x, const uint32_t* words) {
  return round_by(x, _mm256_srli_epi32(load_words(words), 16), _mm256_srli_epi32(load_words(words + 8), 16));
}
GRADDROP_FN Vec2 round_by_lower_half(Vec2 x, const uint32_t* words) {
  return round_by(x, lower_halves(load_words(words)), lower_halves(load_words(words + 8)));
}
GRADDROP_FN void load(const BFloat16* source, Vec2& x) {
  const __m256i memory = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  x.a.x = _mm256_castsi256_ps(_mm256_slli_epi32(memory, 16));
  x.b.x = _mm256_castsi256_ps(_mm256_and_si256(memory, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
GRADDROP_FN __m256i to_bfloat16(Vec2 x) {
  __m256i even = round_to_bfloat16(x.a), odd = round_to_bfloat16(x.b);
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(x.a.x, x.b.x, _CMP_UNORD_Q)), 0)) {  // a NaN in either
    even = with_nan(x.a, even);
    odd = with_nan(x.b, odd);
  }
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
}
GRADDROP_FN void store(BFloat16* target, Vec2 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bfloat16(x));
}
GRADDROP_FN void store_kept(BFloat16* target, Lanes2 keep, Vec2 x) {
  __m256i* wide = reinterpret_cast<__m256i*>(target);
  _mm256_storeu_si256(wide, _mm256_blendv_epi8(_mm256_loadu_si256(wide), to_bfloat16(x), keep.both));
}
GRADDROP_FN void lanes_at(const Keep& keep, int i, Lanes2& lanes) {
  lanes.both = load_u16(keep.lanes + i);
  lanes.a.x = _mm256_srai_epi32(_mm256_slli_epi32(lanes.both, 16), 16);
  lanes.b.x = _mm256_srai_epi32(lanes.both, 16);
}
GRADDROP_FN void lookup(const float* table, int64_t size, const uint16_t* index, Vec2& x) {
  const __m256i both = load_u16(index);
  lookup(table, size, _mm256_and_si256(both, _mm256_set1_epi32(0xffff)), x.a);
  lookup(table, size, _mm256_srli_epi32(both, 16), x.b);
}

// The vector for rows of parameters P and moments M.
template <typename P, typename M>
struct VectorFor {
  using Type = Vec;
};
template <>
struct VectorFor<BFloat16, BFloat16> {
  using Type = Vec2;
};

}  // namespace
}  // namespace graddrop
