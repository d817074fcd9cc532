// 8 floats in an AVX2 register, and the mask-making that goes with them. Included by masked_adamw_avx2.cpp only.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../mask.h"

namespace graddrop {
namespace {

struct Vec {
  static constexpr int kWidth = 8;
  __m256 x;
  Vec() = default;
  explicit Vec(__m256 x) : x(x) {}
  explicit Vec(float value) : x(_mm256_set1_ps(value)) {}
};
struct Lanes {  // all ones where kept
  __m256i x;
};

GRADDROP_FN Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.x, b.x)); }
GRADDROP_FN Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.x, b.x)); }
GRADDROP_FN Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.x, b.x)); }
GRADDROP_FN Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.x, b.x, c.x)); }
GRADDROP_FN Vec div(Vec a, Vec b) { return Vec(_mm256_div_ps(a.x, b.x)); }
GRADDROP_FN Vec sqrt(Vec a) { return Vec(_mm256_sqrt_ps(a.x)); }
GRADDROP_FN Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.x, b.x)); }
GRADDROP_FN Vec keep_or_zero(Lanes keep, Vec a) { return Vec(_mm256_and_ps(_mm256_castsi256_ps(keep.x), a.x)); }
GRADDROP_FN Vec select(Lanes keep, Vec yes, Vec no) { return Vec(_mm256_blendv_ps(no.x, yes.x, _mm256_castsi256_ps(keep.x))); }
GRADDROP_FN Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return Vec(_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ)));
}
GRADDROP_FN bool all_less(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_LT_OQ)) == 0xff; }
GRADDROP_FN Vec exponent_and_mantissa(Vec y, Vec& mantissa) {
  const __m256i sqrt_half = _mm256_set1_epi32(0x3f3504f3);
  const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(y.x), sqrt_half);
  mantissa.x = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(0x7fffff)), sqrt_half));
  return Vec(_mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 23)));
}
GRADDROP_FN Vec symmetric_uniform(const uint32_t* words) {
  const __m256i top = _mm256_srai_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 8);
  return Vec(_mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(top), _mm256_set1_ps(0.5f)), _mm256_set1_ps(0x1p-23f)));
}

// 8 lanes of keep bits beginning at bit i; i is a multiple of 8.
GRADDROP_FN Lanes lanes_at(const uint64_t* bits, int i) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i byte = _mm256_set1_epi32(reinterpret_cast<const uint8_t*>(bits)[i / 8]);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(byte, each), each)};
}

GRADDROP_FN __m128i to_half_lanes(Lanes keep) {  // 8 lanes of 32 bits -> 8 lanes of 16 bits
  return _mm_packs_epi32(_mm256_castsi256_si128(keep.x), _mm256_extracti128_si256(keep.x, 1));
}
GRADDROP_FN void store_half_kept(uint16_t* target, Lanes keep, __m128i a) {
  __m128i* wide = reinterpret_cast<__m128i*>(target);
  _mm_storeu_si128(wide, _mm_blendv_epi8(_mm_loadu_si128(wide), a, to_half_lanes(keep)));
}

GRADDROP_FN Vec load(const float* source) { return Vec(_mm256_loadu_ps(source)); }
GRADDROP_FN void store(float* target, Vec a) { _mm256_storeu_ps(target, a.x); }
GRADDROP_FN void store_kept(float* target, Lanes keep, Vec a) { _mm256_maskstore_ps(target, keep.x, a.x); }

struct BFloat16 { uint16_t bits; };
GRADDROP_FN Vec load(const BFloat16* source) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}
GRADDROP_FN __m128i to_bfloat16(Vec a) {  // round to nearest even
  const __m256i u = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256 nan = _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
GRADDROP_FN void store(BFloat16* target, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_bfloat16(a)); }
GRADDROP_FN void store_kept(BFloat16* target, Lanes keep, Vec a) { store_half_kept(&target->bits, keep, to_bfloat16(a)); }

struct Float16 { uint16_t bits; };
GRADDROP_FN Vec load(const Float16* source) { return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))); }
GRADDROP_FN __m128i to_float16(Vec a) { return _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GRADDROP_FN void store(Float16* target, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_float16(a)); }
GRADDROP_FN void store_kept(Float16* target, Lanes keep, Vec a) { store_half_kept(&target->bits, keep, to_float16(a)); }

// table[index] for 8 indices; a table of at most 8 entries (allocated as 16) is one shuffle, a longer one is gathered.
GRADDROP_FN Vec lookup(const float* table, int64_t size, const uint16_t* index) {
  const __m256i i = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
  if (size <= 8) return Vec(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i));
  return Vec(_mm256_i32gather_ps(table, i, 4));
}

// 16 Philox calls, q = first .. first + 15: 64 words in natural order. As in simd_avx512.h, with 4 calls a register and four registers in flight.
static __attribute__((noinline)) void philox_16_calls(uint64_t first, uint32_t draw, uint32_t domain, uint64_t key, uint32_t* words) {
  const __m256i offsets = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  for (int half = 0; half < 2; ++half) {  // two by two: 16 registers hold no more
    __m256i a[2], b[2], c[2], d[2];
    for (int u = 0; u < 2; ++u) {
      a[u] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + 8 * half + 4 * u)), offsets);
      b[u] = _mm256_srli_epi64(a[u], 32);
      c[u] = _mm256_set1_epi64x(draw);
      d[u] = _mm256_set1_epi64x(domain);
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi32(static_cast<int>(k0)), key1 = _mm256_set1_epi32(static_cast<int>(k1));
      for (int u = 0; u < 2; ++u) {
        const __m256i product0 = _mm256_mul_epu32(a[u], m0), product1 = _mm256_mul_epu32(c[u], m1);
        a[u] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), b[u]), key0);
        c[u] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), d[u]), key1);
        b[u] = product1;
        d[u] = product0;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int u = 0; u < 2; ++u) {
      const __m256i xy = _mm256_blend_epi32(a[u], _mm256_slli_epi64(b[u], 32), 0xAA);
      const __m256i zw = _mm256_blend_epi32(c[u], _mm256_slli_epi64(d[u], 32), 0xAA);
      uint32_t* out = words + 32 * half + 16 * u;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(xy, zw));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(xy, zw));
    }
  }
}

GRADDROP_FN __m256i load_u16(const uint16_t* u16) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(u16)); }

// bits[i] = (uint16_t)(u16[i] - low) <= span, for count elements rounded up to 64.
GRADDROP_FN void in_range(const uint16_t* u16, int count, uint16_t low, uint16_t span, uint64_t* bits) {
  const __m256i lows = _mm256_set1_epi16(static_cast<int16_t>(low)), spans = _mm256_set1_epi16(static_cast<int16_t>(span));
  for (int i = 0; i < count; i += 64) {
    uint32_t halves[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i first = _mm256_sub_epi16(load_u16(u16 + i + 32 * half), lows);
      const __m256i second = _mm256_sub_epi16(load_u16(u16 + i + 32 * half + 16), lows);
      const __m256i first_in = _mm256_cmpeq_epi16(_mm256_min_epu16(first, spans), first);  // a <= b is min(a, b) == a
      const __m256i second_in = _mm256_cmpeq_epi16(_mm256_min_epu16(second, spans), second);
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(first_in, second_in), 0xD8);
      halves[half] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    }
    bits[i / 64] = halves[0] | static_cast<uint64_t>(halves[1]) << 32;
  }
}

// u16[i] = (u16[i] * buckets) >> 16, for count elements rounded up to 16.
GRADDROP_FN void to_buckets(uint16_t* u16, int count, uint32_t buckets) {
  for (int i = 0; i < count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(u16 + i), _mm256_mulhi_epu16(load_u16(u16 + i), _mm256_set1_epi16(static_cast<int16_t>(buckets))));
}

// u16[i] |= bit i << plane, for count elements rounded up to 16.
GRADDROP_FN void add_plane(const uint64_t* bits, int count, int plane, uint16_t* u16) {
  const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  const __m256i value = _mm256_set1_epi16(static_cast<int16_t>(1 << plane));
  for (int i = 0; i < count; i += 16) {
    const __m256i lanes = _mm256_set1_epi16(static_cast<int16_t>(reinterpret_cast<const uint16_t*>(bits)[i / 16]));
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(lanes, each), each);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(u16 + i), _mm256_or_si256(load_u16(u16 + i), _mm256_and_si256(set, value)));
  }
}

}  // namespace
}  // namespace graddrop
