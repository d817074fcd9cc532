// The AdamW update, once: the order of torch's CUDA fused kernel, every fma written out. graddrop_kernels/reference.py is its plain form.
// Template over the float type F: float here and on the GPU, a vector of floats in csrc/cpu. Everything stays in registers.
#pragma once
#include "host_device.h"

namespace graddrop {

template <typename F>
struct AdamWScalars {
  F neg_lr_weight_decay;  // -(lr * weight_decay)
  F beta1, neg_beta1, beta2, neg_beta2;
  F step_size;              // lr / (1 - beta1^t)
  F bias_correction2_sqrt;  // sqrt(1 - beta2^t)
  F eps;
};

template <typename F>
struct AdamWElement {
  F param, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// g: the masked, scaled and signed gradient.
template <typename F>
GRADDROP_FN void adamw_update(AdamWElement<F>& e, F g, const AdamWScalars<F>& s, bool decay, bool amsgrad) {
  // decoupled weight decay; skipped when 0, so that an infinite parameter does not become NaN
  if (decay) e.param = fma(s.neg_lr_weight_decay, e.param, e.param);
  // first moment: m = b1 m + (1 - b1) g
  e.exp_avg = fma(s.beta1, e.exp_avg, fma(s.neg_beta1, g, g));
  // second moment: v = b2 v + (1 - b2) g^2, g^2 rounded first
  const F g_squared = g * g;
  e.exp_avg_sq = fma(s.beta2, e.exp_avg_sq, fma(s.neg_beta2, g_squared, g_squared));
  F vhat = e.exp_avg_sq;
  if (amsgrad) vhat = e.max_exp_avg_sq = max(e.exp_avg_sq, e.max_exp_avg_sq);
  const F denom = div(sqrt(vhat), s.bias_correction2_sqrt) + s.eps;
  e.param = e.param - div(s.step_size * e.exp_avg, denom);
}

}  // namespace graddrop
