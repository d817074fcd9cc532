// The tables that every compiled backend walks: one TensorRow a parameter, one HyperRow for the parameters that share
// hyper-parameters and a mask plan.
// Plain C layout: graddrop_kernels/backends/tensor_table.py mirrors it field by field. Change both, and kTableVersion.
#pragma once
#include <cstdint>

namespace graddrop {

constexpr int32_t kTableVersion = 1;

enum DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct TensorRow {
  void* param;
  const void* grad;  // param's dtype
  void* exp_avg;     // moments: float32 or param's dtype
  void* exp_avg_sq;
  void* max_exp_avg_sq;        // null without amsgrad
  float* step;                 // completed steps; advanced by the call
  const uint32_t* mask_words;  // bit-planes of num_words(numel) words each, or null
  int64_t numel;
  int64_t base, local_inner, global_inner;  // RowBlock: global index of local element i
  uint64_t key;                             // Philox key of the parameter's stream
  int64_t hyper;                            // index of its HyperRow
};

struct HyperRow {
  double lr, beta1, beta2, eps, weight_decay;
  double scale;
  double age_rate;      // bias corrections see step 1 + (t - 1) * age_rate, t the parameter's own step ...
  int64_t global_step;  // ... unless this is not 0 ...
  const int64_t* ages;  // ... or there is one age a bucket, num_ages of them
  int64_t num_ages;
  int64_t draw;  // the Philox draw; -1: the parameter's own completed steps
  int32_t kind;  // MaskKind
  int32_t frozen;
  int32_t threshold;
  int32_t buckets, first_bucket, last_bucket;
  int32_t num_planes;  // -1: recompute buckets
  int32_t amsgrad;
  int32_t maximize;
  int32_t reserved;
};

static_assert(sizeof(TensorRow) == 104 && sizeof(HyperRow) == 128, "tensor_table.py has the same sizes");

}  // namespace graddrop
