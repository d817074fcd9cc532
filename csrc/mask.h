// The mask rule: which elements a step keeps, as integer comparisons on 16-bit draws.
// Plain numbers, filled from a Python MaskPlan.
#pragma once
#include "philox.h"

namespace graddrop {

// What is masked, as the plan of masks/plan.py has it in two bools. kMaskUpdate: the moments see the whole gradient, and
// only the parameter is masked. Its scale is in step_size.
enum Masked : int32_t { kMaskGradient, kMaskFrozen, kMaskUpdate };

enum MaskKind : int32_t { kKeep, kOff, kBernoulli, kGaussian, kBucket, kFixed };  // as in masks/plan.py

struct MaskSpec {
  int32_t kind;
  int32_t masked;         // Masked: the gradient of dropped elements, or all of their state, or their parameter
  uint32_t threshold;     // kBernoulli: keep = u16 >= threshold
  uint32_t draw;          // third counter word
  uint32_t buckets;       // kBucket: bucket = (u16 * buckets) >> 16, at most 4096
  uint32_t first_bucket;  // keep = first_bucket <= bucket <= last_bucket
  uint32_t last_bucket;
  int32_t num_planes;  // kBucket: bit-planes in mask_words; -1: recompute the bucket from its draw
  uint64_t key;
  float scale;  // factor on kept gradients; kGaussian: standard deviation of the factor around 1
};

GRADDROP_FN uint32_t uniform16(const PhiloxWords& words, int element) {  // element: index & 7
  return (words.word[(element >> 1) & 3] >> (16 * (element & 1))) & 0xffffu;
}

GRADDROP_FN uint32_t bucket_of(uint32_t u16, uint32_t buckets) { return (u16 * buckets) >> 16; }

GRADDROP_FN bool bucket_active(uint32_t bucket, const MaskSpec& spec) {
  return spec.first_bucket <= bucket && bucket <= spec.last_bucket;
}

}  // namespace graddrop
