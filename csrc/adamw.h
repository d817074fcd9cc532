// The AdamW update, once: the order of torch's CUDA fused kernel, every fma written out.
// graddrop_kernels/backends/reference/step.py is its plain form.
// Template over the float type F: float here and on the GPU, a vector of floats in csrc/cpu.
// Everything stays in registers.
#pragma once
#include "host_device.h"

namespace graddrop {

template <typename F>
struct AdamWScalars {
  F lr_weight_decay;
  F beta1, beta2;
  F step_size;                         // lr / (1 - beta1^t)
  F bias_correction2_sqrt;             // sqrt(1 - beta2^t)
  F bias_correction2_sqrt_reciprocal;  // 1 / bias_correction2_sqrt, rounded once
  F eps;
};

constexpr float kFloatMax = 3.402823466e38f;

// a / b, rounded once, for many a >= 0 and one b in (0, 1] with r = 1 / b rounded once: a product and two fma instead
// of a division, which is four times slower than they are. Exact by Markstein's theorem ("Computation of elementary
// functions on the IBM RISC System/6000", 1990): q is within an ulp, its remainder is exact, and the last fma rounds
// once. An infinite a needs the remainder of a finite q.
template <typename F>
GRADDROP_FN F div_by_constant(F a, F b, F r) {
  const F q = min(a * r, F(kFloatMax));
  return fma(negate_fma(q, b, a), r, q);
}

template <typename F>
struct AdamWElement {
  F exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// The update in two steps, so that a vector loop can do the first of one block and the second of the block before: the
// square root and the division between them take a hundred cycles in a row, which the processor then spends on other
// elements.
template <typename F>
struct AdamWDirection {
  F numerator;  // step_size * m
  F root;       // sqrt(vhat)
};

// g: the masked, scaled and signed gradient.
template <typename F>
GRADDROP_FN AdamWDirection<F> adamw_moments(AdamWElement<F>& e, F g, const AdamWScalars<F>& s, bool amsgrad) {
  // first moment: m = b1 m + (1 - b1) g
  e.exp_avg = fma(s.beta1, e.exp_avg, negate_fma(s.beta1, g, g));
  // second moment: v = b2 v + (1 - b2) g^2, g^2 rounded first. An infinite g^2 gives an infinite v, by which nothing
  // moves, and not the difference of two infinities, which is NaN.
  const F g_squared = g * g;
  e.exp_avg_sq = fma(s.beta2, e.exp_avg_sq, negate_fma(s.beta2, min(F(kFloatMax), g_squared), g_squared));
  F vhat = e.exp_avg_sq;
  if (amsgrad) vhat = e.max_exp_avg_sq = max(e.exp_avg_sq, e.max_exp_avg_sq);
  return {s.step_size * e.exp_avg, sqrt(vhat)};
}

// Whether weight decay is not 0: it is skipped when it is, so that an infinite parameter does not become NaN. Cautious
// (arXiv 2510.12402): not where the update moves a parameter away from 0.
enum Decay : int32_t { kNoDecay, kPlainDecay, kCautiousDecay };

template <typename F>
GRADDROP_FN F adamw_param(F param, const AdamWDirection<F>& direction, const AdamWScalars<F>& s, Decay decay) {
  // decoupled weight decay; the usual way first, and at no cost
  if (__builtin_expect(decay == kPlainDecay, 1))
    param = negate_fma(s.lr_weight_decay, param, param);
  else if (decay == kCautiousDecay)
    param = where_negative(direction.numerator * param, param, negate_fma(s.lr_weight_decay, param, param));
  const F denom = div_by_constant(direction.root, s.bias_correction2_sqrt, s.bias_correction2_sqrt_reciprocal) + s.eps;
  return param - div(direction.numerator, denom);
}

}  // namespace graddrop
