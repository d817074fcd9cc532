// Stochastic rounding of a float32 to bfloat16, up or down at odds that make the mean exact.
// Computes the same as stochastic_bfloat16 in graddrop_kernels/backends/reference/rounding.py.
// csrc/cpu/simd_*.h do so for a register of floats.
#pragma once
#include "host_device.h"

namespace graddrop {

// Returns one of the two bfloat16 around x, as a float. Infinity and NaN are returned as they are, to be rounded as
// usual. The upper half of a random word is added to the half that a bfloat16 lacks, and the sum is truncated.
GRADDROP_FN float round_stochastically(float x, uint32_t word) {
  const uint32_t u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : float_of((u + (word >> 16)) & 0xffff0000u);
}

}  // namespace graddrop
