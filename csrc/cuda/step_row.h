// The prologue: computes the values that a step needs of a tensor on the device, so that no number comes back to the
// host. Computes the same as prepare() and step_scalars() of csrc/cpu/masked_adamw.cpp.
#pragma once
#include <cmath>
#include <cstring>

#include "../adamw.h"
#include "../mask.h"
#include "../tensor_table.h"

namespace graddrop {

// A number of a HyperRow, or that of a tensor on the device, which may change without the host's knowledge.
GRADDROP_FN double number_of(const double& number, int32_t at) {
  if (at == kHere) return number;
  const void* address;
  std::memcpy(&address, &number, sizeof address);
  return at == kInFloat ? *static_cast<const float*>(address) : *static_cast<const double*>(address);
}
GRADDROP_FN float lr_of(const HyperRow& hyper) { return static_cast<float>(number_of(hyper.lr, hyper.lr_at)); }

// The scalars that depend on the age. float64 from the float32-rounded betas, rounded once.
// 1 - pow() and not -expm1(age * log(beta)), which is more accurate, because the CPU backend and the reference have it,
// and the aim is their bits. The host's pow() is within 0.52 ulp, CUDA's within 2, so 1 - beta^t differs by at most
// 3e-16; that changes its float32 with a probability of 3e-16 / (1 - beta^t) / 2^-24: 5e-6 for beta 0.999 in the first
// step, less later.
struct AgeScalars {
  float step_size, bias_correction2_sqrt, bias_correction2_sqrt_reciprocal;
};
GRADDROP_FN AgeScalars age_scalars(const HyperRow& hyper, double age) {
  const double beta1 = static_cast<float>(hyper.beta1), beta2 = static_cast<float>(hyper.beta2);
  const float bias_correction1 = static_cast<float>(1.0 - ::pow(beta1, age));
  const float bias_correction2_sqrt = static_cast<float>(::sqrt(1.0 - ::pow(beta2, age)));
  const float scale = hyper.masked == kMaskUpdate ? static_cast<float>(hyper.scale) : 1.0f;
  return {div(lr_of(hyper), bias_correction1) * scale, bias_correction2_sqrt, div(1.0f, bias_correction2_sqrt)};
}

GRADDROP_FN bool moves(const HyperRow& hyper, const float* found_inf) {
  return !(hyper.kind == kOff && hyper.masked == kMaskFrozen) && !(found_inf && *found_inf != 0);
}

GRADDROP_FN StepRow step_row_of(const HyperRow& hyper, int64_t completed_steps, bool moves, int64_t age_stride) {
  const bool off = hyper.kind == kOff, update = hyper.masked == kMaskUpdate;
  const double weight_decay = number_of(hyper.weight_decay, hyper.weight_decay_at);
  StepRow step = {};
  step.lr_weight_decay = lr_of(hyper) * static_cast<float>(weight_decay);
  step.beta1 = static_cast<float>(hyper.beta1);
  step.beta2 = static_cast<float>(hyper.beta2);
  step.eps = static_cast<float>(hyper.eps);
  step.factor = hyper.maximize && (!off || update) ? -1.0f : 1.0f;
  if (!update && (hyper.kind == kBernoulli || hyper.kind == kFixed)) step.factor *= static_cast<float>(hyper.scale);
  step.deviation = hyper.kind == kGaussian ? static_cast<float>(hyper.scale) : 0.0f;
  step.threshold = hyper.kind == kBernoulli ? hyper.threshold : off ? 65536 : 0;
  step.draw = static_cast<uint32_t>(hyper.kind == kBucket ? 0 : hyper.draw < 0 ? completed_steps : hyper.draw);
  // One bucket for all, inside of the range or outside of it. A fixed mask is a bit-plane of two buckets.
  step.buckets = 1;
  step.first_bucket = off ? 1 : 0;
  step.last_bucket = off ? 0 : 4096;
  if (hyper.kind == kBucket) {
    step.buckets = hyper.buckets;
    step.first_bucket = hyper.first_bucket;
    step.last_bucket = hyper.last_bucket;
  } else if (hyper.kind == kFixed) {
    step.buckets = 2;
    step.first_bucket = step.last_bucket = 1;
  }
  step.flags = (moves ? 0 : kSkipFlag) | (off && !update ? kOffFlag : 0) |
               (hyper.masked == kMaskFrozen ? kFrozenFlag : 0) | (weight_decay != 0 ? kDecayFlag : 0);
  if (hyper.num_ages) {
    step.num_ages = static_cast<uint32_t>(hyper.buckets < age_stride ? hyper.buckets : age_stride);
  } else {
    const AgeScalars s =
        age_scalars(hyper, hyper.global_step ? static_cast<double>(hyper.global_step)
                                             : 1.0 + static_cast<double>(completed_steps) * hyper.age_rate);
    step.step_size = s.step_size;
    step.bias_correction2_sqrt = s.bias_correction2_sqrt;
    step.bias_correction2_sqrt_reciprocal = s.bias_correction2_sqrt_reciprocal;
  }
  return step;
}

// Writes the entry of one bucket. Buckets past the last age are not active yet; age 1 keeps their results finite.
GRADDROP_FN void write_age(const HyperRow& hyper, int64_t completed_steps, int64_t bucket, float* entry) {
  AgeScalars s = {1.0f, 1.0f, 1.0f};
  if (bucket < hyper.num_ages) {
    int64_t age = hyper.ages[bucket];
    if (age < 1) age = 1;
    if (age > completed_steps + 1) age = completed_steps + 1;
    s = age_scalars(hyper, static_cast<double>(age));
  }
  entry[0] = s.step_size;
  entry[1] = s.bias_correction2_sqrt;
  entry[2] = s.bias_correction2_sqrt_reciprocal;
  entry[3] = 0.0f;
}

}  // namespace graddrop
