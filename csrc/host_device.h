// Marks and elementary operations that mean the same to a C++ compiler and to nvcc. Compile with contraction off
// (-ffp-contract=off, -fmad=false): every fused multiply-add of the project is written out.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GRADDROP_FN static __host__ __device__ __forceinline__
#else
// Internal linkage matters: the same header is compiled for several instruction sets, and the linker must not merge the
// results.
#define GRADDROP_FN static inline __attribute__((always_inline, unused))
#endif

namespace graddrop {

GRADDROP_FN uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
GRADDROP_FN float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

GRADDROP_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

GRADDROP_FN float negate_fma(float a, float b, float c) { return fma(-a, b, c); }

GRADDROP_FN float sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

GRADDROP_FN float div(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

GRADDROP_FN float min(float a, float b) { return a < b ? a : b; }  // b where either is NaN, as vminps does
GRADDROP_FN float max(float a, float b) { return a > b ? a : b; }  // b where either is NaN, as vmaxps does

GRADDROP_FN float where_negative(float x, float a, float b) { return x < 0.0f ? a : b; }

GRADDROP_FN uint32_t mulhi(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

}  // namespace graddrop
