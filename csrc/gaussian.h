// Standard normal numbers in pairs, from two 32-bit words each: the method of Box and Muller. A radius sqrt(-2 ln y) and
// an angle give both. The operations give the same bits everywhere. The polynomials are minimax fits, see
// graddrop_kernels/backends/reference/gaussian.py, which computes the same.
// The functions are templates over F: float here and on the GPU, a vector of floats in csrc/cpu.
#pragma once
#include "host_device.h"

namespace graddrop {

// What two random words give: two multiples of 2^-23 in [1, 2), and 0 or -0.
template <typename F>
struct Uniforms {
  F radius, angle, sign;
};
GRADDROP_FN Uniforms<float> uniforms(uint32_t first, uint32_t second) {
  return {float_of(first >> 9 | 0x3f800000u), float_of((second >> 8 & 0x7fffffu) | 0x3f800000u),
          float_of(second & 0x80000000u)};
}

GRADDROP_FN float flip(float a, float sign) { return float_of(bits_of(a) ^ bits_of(sign)); }

// y = mantissa * 2^result, mantissa in [sqrt(1/2), sqrt(2))
GRADDROP_FN float exponent_and_mantissa(float y, float& mantissa) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;  // the bits of sqrt(1/2)
  const uint32_t shifted = bits_of(y) - kSqrtHalf;
  mantissa = float_of((shifted & 0x7fffffu) + kSqrtHalf);
  return static_cast<float>(static_cast<int32_t>(shifted) >> 23);
}

template <typename F>
GRADDROP_FN F minus_2_log(F y) {  // y in (0, 1], normal
  F mantissa;
  const F exponent = exponent_and_mantissa(y, mantissa);
  const F f = mantissa - F(1.0f);
  F poly = F(0.21372777f);
  poly = fma(poly, f, F(-0.3234426f));
  poly = fma(poly, f, F(0.3413759f));
  poly = fma(poly, f, F(-0.3981573f));
  poly = fma(poly, f, F(0.49969336f));
  poly = fma(poly, f, F(-0.66669166f));
  poly = fma(poly, f, F(1.0000015f));
  return fma(exponent, F(-1.3862944f), fma(poly, f * f, F(-2.0f) * f));
}

template <typename F>
GRADDROP_FN F cos_pi(F s) {  // cos(pi x) of s = x^2, |x| <= 1/2
  F poly = F(0.2196968f);
  poly = fma(poly, s, F(-1.3318802f));
  poly = fma(poly, s, F(4.058412f));
  poly = fma(poly, s, F(-4.934793f));
  return fma(poly, s, F(0.99999994f));
}

template <typename F>
GRADDROP_FN F sin_pi_by_x(F s) {  // sin(pi x) / x
  F poly = F(0.077659406f);
  poly = fma(poly, s, F(-0.5982922f));
  poly = fma(poly, s, F(2.5500777f));
  poly = fma(poly, s, F(-5.1677103f));
  return fma(poly, s, F(3.1415927f));
}

template <typename F>
GRADDROP_FN void normal_pair(const Uniforms<F>& u, F& even, F& odd) {
  const F radius = flip(sqrt(minus_2_log(F(2.0f) - u.radius)), u.sign);  // the sign turns by half a turn
  const F x = F(1.5f) - u.angle, s = x * x;
  even = radius * cos_pi(s);
  odd = radius * (x * sin_pi_by_x(s));
}

}  // namespace graddrop
