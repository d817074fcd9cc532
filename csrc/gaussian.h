// Standard normal numbers from 32-bit words: sqrt(2) erfinv(x), x uniform in (-1, 1). The operations give the same bits
// everywhere.
// Polynomials: M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011). Logarithm: Cephes logf.
// Computes the same as graddrop_kernels/backends/reference/gaussian.py.
// The functions are templates over F: float here and on the GPU, a vector of floats in csrc/cpu.
#pragma once
#include "host_device.h"

namespace graddrop {

// y = mantissa * 2^result, mantissa in [sqrt(1/2), sqrt(2))
GRADDROP_FN float exponent_and_mantissa(float y, float& mantissa) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  union {
    float f;
    int32_t i;
  } bits = {y};
  const int32_t shifted = bits.i - kSqrtHalf;
  bits.i = (shifted & 0x7fffff) + kSqrtHalf;
  mantissa = bits.f;
  return static_cast<float>(shifted >> 23);
}

GRADDROP_FN float select_less(float a, float b, float yes, float no) { return a < b ? yes : no; }

GRADDROP_FN float symmetric_uniform(uint32_t word) {  // odd multiples of 2^-24 in (-1, 1), exact
  return (static_cast<float>(static_cast<int32_t>(word) >> 8) + 0.5f) * 0x1p-23f;
}

template <typename F>
GRADDROP_FN F log_positive(F y) {  // y in (0, 1], normal
  F mantissa;
  const F exponent = exponent_and_mantissa(y, mantissa);
  const F f = mantissa - F(1.0f);
  F poly = F(7.0376836292e-2f);
  poly = fma(poly, f, F(-1.1514610310e-1f));
  poly = fma(poly, f, F(1.1676998740e-1f));
  poly = fma(poly, f, F(-1.2420140846e-1f));
  poly = fma(poly, f, F(1.4249322787e-1f));
  poly = fma(poly, f, F(-1.6668057665e-1f));
  poly = fma(poly, f, F(2.0000714765e-1f));
  poly = fma(poly, f, F(-2.4999993993e-1f));
  poly = fma(poly, f, F(3.3333331174e-1f));
  const F square = f * f;
  const F log1p = f + fma(poly, f * square, F(-0.5f) * square);
  return fma(exponent, F(0.6931471805599453f), log1p);
}

template <typename F>
GRADDROP_FN F erfinv_centre(F t) {
  F z = F(2.81022636e-08f);
  z = fma(z, t, F(3.43273939e-07f));
  z = fma(z, t, F(-3.5233877e-06f));
  z = fma(z, t, F(-4.39150654e-06f));
  z = fma(z, t, F(0.00021858087f));
  z = fma(z, t, F(-0.00125372503f));
  z = fma(z, t, F(-0.00417768164f));
  z = fma(z, t, F(0.246640727f));
  return fma(z, t, F(1.50140941f));
}

template <typename F>
GRADDROP_FN F erfinv_tail(F t) {
  F z = F(-0.000200214257f);
  z = fma(z, t, F(0.000100950558f));
  z = fma(z, t, F(0.00134934322f));
  z = fma(z, t, F(-0.00367342844f));
  z = fma(z, t, F(0.00573950773f));
  z = fma(z, t, F(-0.0076224613f));
  z = fma(z, t, F(0.00943887047f));
  z = fma(z, t, F(1.00167406f));
  return fma(z, t, F(2.83297682f));
}

GRADDROP_FN bool all_less(float a, float b) { return a < b; }

template <typename F>
GRADDROP_FN F normal_from_uniform(F x) {  // x from symmetric_uniform
  const F one = F(1.0f);
  const F w = F(0.0f) - log_positive((one - x) * (one + x));
  F z = erfinv_centre(w - F(2.5f));
  if (!all_less(w, F(5.0f)))  // |x| > 0.9966: one element in 300
    z = select_less(w, F(5.0f), z, erfinv_tail(sqrt(w) - F(3.0f)));
  return z * x * F(1.4142135623730951f);
}

}  // namespace graddrop
