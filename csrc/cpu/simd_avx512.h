// 16 floats in an AVX-512 register, and the masks made in it.
// Included by kernels_avx512.cpp and kernels_avx512_bf16.cpp.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../gaussian.h"
#include "../mask.h"

namespace graddrop {
namespace {

using Lanes = __mmask16;
struct Vec {
  using LaneMask = Lanes;
  static constexpr int kWidth = 16;
  __m512 x;
  Vec() = default;
  explicit Vec(__m512 x) : x(x) {}
  explicit Vec(float value) : x(_mm512_set1_ps(value)) {}
};

GRADDROP_FN Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.x, b.x)); }
GRADDROP_FN Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.x, b.x)); }
GRADDROP_FN Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.x, b.x)); }
GRADDROP_FN Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec div(Vec a, Vec b) { return Vec(_mm512_div_ps(a.x, b.x)); }
GRADDROP_FN Vec sqrt(Vec a) { return Vec(_mm512_sqrt_ps(a.x)); }
GRADDROP_FN Vec min(Vec a, Vec b) { return Vec(_mm512_min_ps(a.x, b.x)); }
GRADDROP_FN Vec negate_fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fnmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(a.x, b.x)); }
GRADDROP_FN Vec where_negative(Vec x, Vec a, Vec b) {
  return Vec(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.x, _mm512_setzero_ps(), _CMP_LT_OQ), b.x, a.x));
}
GRADDROP_FN Vec keep_or_zero(Lanes keep, Vec a) { return Vec(_mm512_maskz_mov_ps(keep, a.x)); }
GRADDROP_FN Vec exponent_and_mantissa(Vec y, Vec& mantissa) {
  const __m512i sqrt_half = _mm512_set1_epi32(0x3f3504f3);
  const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(y.x), sqrt_half);
  mantissa.x = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(0x7fffff)), sqrt_half));
  return Vec(_mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23)));
}
GRADDROP_FN Vec flip(Vec a, Vec sign) { return Vec(_mm512_xor_ps(a.x, sign.x)); }
// Of 16 pairs of words, in an order that store_pairs() undoes.
GRADDROP_FN Uniforms<Vec> load_uniforms(const uint32_t* words) {
  const __m512 low = _mm512_loadu_ps(words), high = _mm512_loadu_ps(words + 16);
  const __m512i first = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0x88));
  const __m512i second = _mm512_castps_si512(_mm512_shuffle_ps(low, high, 0xdd));
  const __m512i one = _mm512_set1_epi32(0x3f800000), sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i angle = _mm512_and_si512(_mm512_srli_epi32(second, 8), _mm512_set1_epi32(0x7fffff));
  return {Vec(_mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(first, 9), one))),
          Vec(_mm512_castsi512_ps(_mm512_or_si512(angle, one))), Vec(_mm512_castsi512_ps(_mm512_and_si512(second, sign)))};
}
GRADDROP_FN void store_pairs(float* target, Vec even, Vec odd) {
  _mm512_storeu_ps(target, _mm512_unpacklo_ps(even.x, odd.x));
  _mm512_storeu_ps(target + 16, _mm512_unpackhi_ps(even.x, odd.x));
}

GRADDROP_FN void load(const float* source, Vec& a) { a.x = _mm512_loadu_ps(source); }
GRADDROP_FN void store(float* target, Vec a) { _mm512_storeu_ps(target, a.x); }
// Stores old and new bits blended, all at once: masked stores are several times slower on AMD processors.
GRADDROP_FN void store_kept(float* target, Lanes keep, Vec a) {
  _mm512_storeu_ps(target, _mm512_mask_mov_ps(_mm512_loadu_ps(target), keep, a.x));
}
GRADDROP_FN void store_kept(uint16_t* target, Lanes keep, __m256i a) {
  __m256i* wide = reinterpret_cast<__m256i*>(target);
  _mm256_storeu_si256(wide, _mm256_mask_mov_epi16(_mm256_loadu_si256(wide), keep, a));
}

struct BFloat16 {
  uint16_t bits;
};
GRADDROP_FN void load(const BFloat16* source, Vec& a) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  a.x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
GRADDROP_FN __m512i round_to_bfloat16(Vec a) {  // to nearest even, in the upper half of each lane
  const __m512i u = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const Lanes nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), nan,
                               _mm512_set1_epi32(0x7fc00000));
}
GRADDROP_FN __m256i to_bfloat16(Vec a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bfloat16(a), 16)); }
GRADDROP_FN void store(BFloat16* target, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bfloat16(a));
}
GRADDROP_FN void store_kept(BFloat16* target, Lanes keep, Vec a) { store_kept(&target->bits, keep, to_bfloat16(a)); }

struct Float16 {
  uint16_t bits;
};
GRADDROP_FN void load(const Float16* source, Vec& a) {
  a.x = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
GRADDROP_FN __m256i to_float16(Vec a) { return _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GRADDROP_FN void store(Float16* target, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_float16(a));
}
GRADDROP_FN void store_kept(Float16* target, Lanes keep, Vec a) { store_kept(&target->bits, keep, to_float16(a)); }

// As in csrc/stochastic.h, for 16 floats and the halves of their random words.
GRADDROP_FN Vec round_by(Vec a, __m512i halves) {
  const __m512i u = _mm512_castps_si512(a.x), exponent = _mm512_set1_epi32(0x7f800000);
  const Lanes finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(u, exponent), exponent);
  const __m512i sum = _mm512_add_epi32(u, halves);
  return Vec(_mm512_castsi512_ps(
      _mm512_mask_and_epi32(u, finite, sum, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))));
}
GRADDROP_FN Vec round_stochastically(Vec a, const uint32_t* words) {
  return round_by(a, _mm512_srli_epi32(_mm512_loadu_si512(words), 16));
}
GRADDROP_FN Vec round_by_lower_half(Vec a, const uint32_t* words) {
  return round_by(a, _mm512_and_si512(_mm512_loadu_si512(words), _mm512_set1_epi32(0xffff)));
}

// Sums of squares in float64, one per lane. The square of a float32 is exact there.
struct Squares {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
};
GRADDROP_FN void add_square(Squares& sums, Vec a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.x)),
                high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.x, 1));
  sums.low = _mm512_fmadd_pd(low, low, sums.low);
  sums.high = _mm512_fmadd_pd(high, high, sums.high);
}
GRADDROP_FN void store(double* target, const Squares& sums) {
  _mm512_storeu_pd(target, sums.low);
  _mm512_storeu_pd(target + 8, sums.high);
}

// table[index] for 16 indices. Tables of up to 16, 32 and 64 entries (allocated as such) are shuffled from registers.
// Longer ones are gathered.
GRADDROP_FN void lookup(const float* table, int64_t size, const uint16_t* index, Vec& a) {
  const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
  if (size > 64) {
    a.x = _mm512_i32gather_ps(i, table, 4);
  } else if (size <= 16) {
    a.x = _mm512_permutexvar_ps(i, _mm512_loadu_ps(table));
  } else {
    a.x = _mm512_permutex2var_ps(_mm512_loadu_ps(table), i, _mm512_loadu_ps(table + 16));
    if (size <= 32) return;
    const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), i, _mm512_loadu_ps(table + 48));
    a.x = _mm512_mask_mov_ps(a.x, _mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), high);
  }
}

// Eight Philox calls in progress. The four state words of a call are in the low halves of 64-bit lanes, 8 calls per
// register. vpmuludq reads only the low halves, so that the high halves of the products do no harm.
struct Philox8 {
  __m512i a, b, c, d;
};
GRADDROP_FN void philox_start(Philox8& s, uint64_t first, uint32_t draw, uint32_t domain) {
  // Lanes start at these offsets so that the unpacks at the end leave natural order.
  s.a = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  s.b = _mm512_srli_epi64(s.a, 32);
  s.c = _mm512_set1_epi64(draw);
  s.d = _mm512_set1_epi64(domain);
}
GRADDROP_FN void philox_round(Philox8& s, const PhiloxKeys& keys, int round) {
  const __m512i product0 = _mm512_mul_epu32(s.a, _mm512_set1_epi64(kPhiloxM0)),
                product1 = _mm512_mul_epu32(s.c, _mm512_set1_epi64(kPhiloxM1));
  const __m512i key0 = _mm512_set1_epi32(static_cast<int>(keys.k0[round])),
                key1 = _mm512_set1_epi32(static_cast<int>(keys.k1[round]));
  s.a = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product1, 32), s.b, key0, 0x96);  // 0x96: three-way xor
  s.c = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product0, 32), s.d, key1, 0x96);
  s.b = product1;
  s.d = product0;
}
GRADDROP_FN void philox_finish(const Philox8& s, uint32_t* words) {
  // b into the odd 32-bit lanes of a, d into those of c: words 0, 1 and words 2, 3 of each call side by side
  const __m512i xy =
      _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(s.a), 0xAAAA, _mm512_castsi512_ps(s.b)));
  const __m512i zw =
      _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(s.c), 0xAAAA, _mm512_castsi512_ps(s.d)));
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(xy, zw));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(xy, zw));
}

// The keep mask of a block of 64 elements, made from draws, buckets or bits.
struct Keep {
  uint64_t bits;
};
GRADDROP_FN void lanes_at(const Keep& keep, int i, Lanes& lanes) { lanes = static_cast<Lanes>(keep.bits >> i); }
GRADDROP_FN void keep_bits(uint64_t bits, Keep& keep) { keep.bits = bits; }
GRADDROP_FN uint64_t bits_of(const Keep& keep) { return keep.bits; }
GRADDROP_FN void keep_at_least(const uint16_t* u16, uint16_t threshold, Keep& keep) {
  const __m512i thresholds = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_loadu_si512(u16), thresholds);
  keep.bits = low | static_cast<uint64_t>(_mm512_cmpge_epu16_mask(_mm512_loadu_si512(u16 + 32), thresholds)) << 32;
}
GRADDROP_FN void keep_in_range(const uint16_t* u16, uint16_t first, uint16_t last, Keep& keep) {
  const __m512i firsts = _mm512_set1_epi16(static_cast<int16_t>(first)),
                spans = _mm512_set1_epi16(static_cast<int16_t>(last - first));
  const uint64_t low = _mm512_cmple_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(u16), firsts), spans);
  const uint64_t high = _mm512_cmple_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(u16 + 32), firsts), spans);
  keep.bits = low | high << 32;
}

// u16[i] = (u16[i] * buckets) >> 16 for 64 elements.
GRADDROP_FN void to_buckets(uint16_t* u16, uint32_t buckets) {
  for (int i = 0; i < 64; i += 32)
    _mm512_storeu_si512(
        u16 + i, _mm512_mulhi_epu16(_mm512_loadu_si512(u16 + i), _mm512_set1_epi16(static_cast<int16_t>(buckets))));
}

// u16[i] |= bit i << plane for 64 elements.
GRADDROP_FN void add_plane(uint64_t bits, int plane, uint16_t* u16) {
  for (int i = 0; i < 64; i += 32) {
    const __m512i plane_bits =
        _mm512_maskz_set1_epi16(static_cast<__mmask32>(bits >> i), static_cast<int16_t>(1 << plane));
    _mm512_storeu_si512(u16 + i, _mm512_or_si512(_mm512_loadu_si512(u16 + i), plane_bits));
  }
}

// Two registers, for rows whose tensors all hold 16 bits per element, so that a whole register of memory is used at a
// time. a holds elements 0 .. 15, b 16 .. 31.
struct Lanes2 {
  Lanes a, b;
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
  load(source, x.a);
  load(source + 16, x.b);
}
GRADDROP_FN Vec2 round_stochastically(Vec2 x, const uint32_t* words) {
  return {round_stochastically(x.a, words), round_stochastically(x.b, words + 16)};
}
GRADDROP_FN Vec2 round_by_lower_half(Vec2 x, const uint32_t* words) {
  return {round_by_lower_half(x.a, words), round_by_lower_half(x.b, words + 16)};
}
GRADDROP_FN void load(const BFloat16* source, Vec2& x) {
  const __m512i memory = _mm512_loadu_si512(source);
  // word j of memory into the upper half of lane j, zero into the lower
  const __m512i low = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                       0, 2, 0, 1, 0, 0, 0);
  x.a.x = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, low, memory));
  x.b.x = _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_add_epi16(low, _mm512_set1_epi16(16)), memory));
}
GRADDROP_FN __m512i to_bfloat16(Vec2 x) {
#if defined(__AVX512BF16__)
  // The processor's own conversion flushes denormals and keeps NaN payloads. Both are so rare that a branch avoids it.
  constexpr int kDenormalOrNaN = 0x20 | 0x80 | 0x01;
  if (__builtin_expect(
          (_mm512_fpclass_ps_mask(x.a.x, kDenormalOrNaN) | _mm512_fpclass_ps_mask(x.b.x, kDenormalOrNaN)) == 0, 1))
    return (__m512i)_mm512_cvtne2ps_pbh(x.b.x, x.a.x);
#endif
  // the upper halves of both: words 1, 3, 5, ... of the pair
  const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(round_to_bfloat16(x.a), upper, round_to_bfloat16(x.b));
}
GRADDROP_FN void store(BFloat16* target, Vec2 x) { _mm512_storeu_si512(target, to_bfloat16(x)); }
GRADDROP_FN void store_kept(BFloat16* target, Lanes2 keep, Vec2 x) {
  const __mmask32 lanes = keep.a | static_cast<uint32_t>(keep.b) << 16;
  _mm512_storeu_si512(target, _mm512_mask_mov_epi16(_mm512_loadu_si512(target), lanes, to_bfloat16(x)));
}
GRADDROP_FN void lanes_at(const Keep& keep, int i, Lanes2& lanes) {
  lanes_at(keep, i, lanes.a);
  lanes_at(keep, i + 16, lanes.b);
}
GRADDROP_FN void lookup(const float* table, int64_t size, const uint16_t* index, Vec2& x) {
  lookup(table, size, index, x.a);
  lookup(table, size, index + 16, x.b);
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
