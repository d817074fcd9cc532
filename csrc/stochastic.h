// Stochastic rounding of a float32 to bfloat16, up or down at odds that make the mean exact, and what is rounded so.
// Computes the same as stochastic_bfloat16 in graddrop_kernels/backends/reference/rounding.py.
// csrc/cpu/simd_*.h do so for a register of floats.
#pragma once
#include "host_device.h"

namespace graddrop {

// Bits of `stochastic`, each for bfloat16 values. backends/batch.py has the same.
enum Stochastic { kRoundParams = 1, kRoundMoments = 2 };

// Returns one of the two bfloat16 around x, as a float. Infinity and NaN are returned as they are, to be rounded as
// usual. The upper half of a random word is added to the half that a bfloat16 lacks, and the sum is truncated.
GRADDROP_FN float round_stochastically(float x, uint32_t word) {
  const uint32_t u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? x : float_of((u + (word >> 16)) & 0xffff0000u);
}

// The same by the lower half of the word. exp_avg takes the upper half, exp_avg_sq and its maximum the lower one: by the
// same bits the maximum stays the largest exp_avg_sq that was stored.
GRADDROP_FN float round_by_lower_half(float x, uint32_t word) { return round_stochastically(x, word << 16); }

}  // namespace graddrop
