// 16 floats in an AVX-512 register, and the mask-making that goes with them. Included by masked_adamw_avx512.cpp only.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../mask.h"

namespace graddrop {
namespace {

struct Vec {
  static constexpr int kWidth = 16;
  __m512 x;
  Vec() = default;
  explicit Vec(__m512 x) : x(x) {}
  explicit Vec(float value) : x(_mm512_set1_ps(value)) {}
};
using Lanes = __mmask16;

GRADDROP_FN Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.x, b.x)); }
GRADDROP_FN Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.x, b.x)); }
GRADDROP_FN Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.x, b.x)); }
GRADDROP_FN Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec div(Vec a, Vec b) { return Vec(_mm512_div_ps(a.x, b.x)); }
GRADDROP_FN Vec sqrt(Vec a) { return Vec(_mm512_sqrt_ps(a.x)); }
GRADDROP_FN Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(a.x, b.x)); }
GRADDROP_FN Vec keep_or_zero(Lanes keep, Vec a) { return Vec(_mm512_maskz_mov_ps(keep, a.x)); }
GRADDROP_FN Vec select(Lanes keep, Vec yes, Vec no) { return Vec(_mm512_mask_mov_ps(no.x, keep, yes.x)); }
GRADDROP_FN Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return select(_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ), yes, no); }
GRADDROP_FN bool all_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ) == 0xffff; }
GRADDROP_FN Vec exponent_and_mantissa(Vec y, Vec& mantissa) {
  const __m512i sqrt_half = _mm512_set1_epi32(0x3f3504f3);
  const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(y.x), sqrt_half);
  mantissa.x = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32(0x7fffff)), sqrt_half));
  return Vec(_mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23)));
}
GRADDROP_FN Vec symmetric_uniform(const uint32_t* words) {
  const __m512i top = _mm512_srai_epi32(_mm512_loadu_si512(words), 8);
  return Vec(_mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(top), _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-23f)));
}

// 16 lanes of keep bits beginning at bit i; i is a multiple of 16.
GRADDROP_FN Lanes lanes_at(const uint64_t* bits, int i) { return reinterpret_cast<const uint16_t*>(bits)[i / 16]; }

GRADDROP_FN Vec load(const float* source) { return Vec(_mm512_loadu_ps(source)); }
GRADDROP_FN void store(float* target, Vec a) { _mm512_storeu_ps(target, a.x); }
GRADDROP_FN void store_kept(float* target, Lanes keep, Vec a) { _mm512_mask_storeu_ps(target, keep, a.x); }

struct BFloat16 { uint16_t bits; };
GRADDROP_FN Vec load(const BFloat16* source) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
GRADDROP_FN __m256i to_bfloat16(Vec a) {  // round to nearest even; vcvtneps2bf16 would flush denormals
  const __m512i u = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const Lanes nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
GRADDROP_FN void store(BFloat16* target, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_bfloat16(a)); }
GRADDROP_FN void store_kept(BFloat16* target, Lanes keep, Vec a) { _mm256_mask_storeu_epi16(target, keep, to_bfloat16(a)); }

struct Float16 { uint16_t bits; };
GRADDROP_FN Vec load(const Float16* source) { return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))); }
GRADDROP_FN __m256i to_float16(Vec a) { return _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GRADDROP_FN void store(Float16* target, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_float16(a)); }
GRADDROP_FN void store_kept(Float16* target, Lanes keep, Vec a) { _mm256_mask_storeu_epi16(target, keep, to_float16(a)); }

// table[index] for 16 indices; a table of at most 16 entries (allocated as 16) is one shuffle, a longer one is gathered.
GRADDROP_FN Vec lookup(const float* table, int64_t size, const uint16_t* index) {
  const __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
  if (size <= 16) return Vec(_mm512_permutexvar_ps(i, _mm512_loadu_ps(table)));
  return Vec(_mm512_i32gather_ps(i, table, 4));
}

// 16 Philox calls, q = first .. first + 15: 64 words in natural order.
// The four state words of a call lie in the low halves of 64-bit lanes, 8 calls a register; vpmuludq reads only the low halves, so that what the
// products leave in the high halves does no harm. Two registers in flight hide the latency of the multiplications.
static __attribute__((noinline)) void philox_16_calls(uint64_t first, uint32_t draw, uint32_t domain, uint64_t key, uint32_t* words) {
  // Lanes start at these offsets so that the unpacks at the end leave natural order.
  const __m512i offsets = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  __m512i a[2], b[2], c[2], d[2];
  for (int u = 0; u < 2; ++u) {
    a[u] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first + 8 * u)), offsets);
    b[u] = _mm512_srli_epi64(a[u], 32);
    c[u] = _mm512_set1_epi64(draw);
    d[u] = _mm512_set1_epi64(domain);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i key0 = _mm512_set1_epi32(static_cast<int>(k0)), key1 = _mm512_set1_epi32(static_cast<int>(k1));
    for (int u = 0; u < 2; ++u) {
      const __m512i product0 = _mm512_mul_epu32(a[u], m0), product1 = _mm512_mul_epu32(c[u], m1);
      a[u] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), b[u], key0, 0x96);  // 0x96: three-way xor
      c[u] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), d[u], key1, 0x96);
      b[u] = product1;
      d[u] = product0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int u = 0; u < 2; ++u) {
    // b into the odd 32-bit lanes of a, d into those of c: words 0, 1 and words 2, 3 of each call side by side
    const __m512i xy = _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(a[u]), 0xAAAA, _mm512_castsi512_ps(b[u])));
    const __m512i zw = _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(c[u]), 0xAAAA, _mm512_castsi512_ps(d[u])));
    _mm512_storeu_si512(words + 32 * u, _mm512_unpacklo_epi64(xy, zw));
    _mm512_storeu_si512(words + 32 * u + 16, _mm512_unpackhi_epi64(xy, zw));
  }
}

// bits[i] = (uint16_t)(u16[i] - low) <= span, for count elements rounded up to 64.
GRADDROP_FN void in_range(const uint16_t* u16, int count, uint16_t low, uint16_t span, uint64_t* bits) {
  const __m512i lows = _mm512_set1_epi16(static_cast<int16_t>(low)), spans = _mm512_set1_epi16(static_cast<int16_t>(span));
  for (int i = 0; i < count; i += 64) {
    const uint64_t first = _mm512_cmple_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(u16 + i), lows), spans);
    const uint64_t second = _mm512_cmple_epu16_mask(_mm512_sub_epi16(_mm512_loadu_si512(u16 + i + 32), lows), spans);
    bits[i / 64] = first | second << 32;
  }
}

// u16[i] = (u16[i] * buckets) >> 16, for count elements rounded up to 32.
GRADDROP_FN void to_buckets(uint16_t* u16, int count, uint32_t buckets) {
  for (int i = 0; i < count; i += 32)
    _mm512_storeu_si512(u16 + i, _mm512_mulhi_epu16(_mm512_loadu_si512(u16 + i), _mm512_set1_epi16(static_cast<int16_t>(buckets))));
}

// u16[i] |= bit i << plane, for count elements rounded up to 32.
GRADDROP_FN void add_plane(const uint64_t* bits, int count, int plane, uint16_t* u16) {
  for (int i = 0; i < count; i += 32) {
    const __mmask32 lanes = reinterpret_cast<const uint32_t*>(bits)[i / 32];
    const __m512i old = _mm512_loadu_si512(u16 + i);
    _mm512_storeu_si512(u16 + i, _mm512_or_si512(old, _mm512_maskz_set1_epi16(lanes, static_cast<int16_t>(1 << plane))));
  }
}

}  // namespace
}  // namespace graddrop
