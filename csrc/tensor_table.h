// The tables that every compiled backend walks. There is one TensorRow per parameter, and one HyperRow for the
// parameters that share hyper-parameters and a mask plan.
// The layout is plain C. graddrop_kernels/backends/tensor_table.py mirrors it field by field: change both, and
// kTableVersion.
#pragma once
#include <cstdint>

namespace graddrop {

constexpr int32_t kTableVersion = 5;

enum DType : int32_t { kFloat32, kBFloat16, kFloat16 };

enum NumberAt : int32_t { kHere, kInFloat, kInDouble };  // it is the number, or the device address of one

struct TensorRow {
  void* param;
  const void* grad;  // of param's dtype, or with master weights of the copy's
  void* exp_avg;     // moments: float32 or param's dtype
  void* exp_avg_sq;
  void* max_exp_avg_sq;        // null without amsgrad
  float* step;                 // completed steps; advanced by the call
  const uint32_t* mask_words;  // bit-planes of num_words(numel) words each, or null
  int64_t numel;
  int64_t base, local_inner, global_inner;  // RowBlock: global index of local element i
  uint64_t key;                             // Philox key of the parameter's stream
  int64_t hyper;                            // index of its HyperRow
  void* copy;                               // receives param, a float32 master, rounded; null: no master
};

struct HyperRow {
  double lr, beta1, beta2, eps, weight_decay;
  double scale;
  double age_rate;      // bias corrections see step 1 + (t - 1) * age_rate, t the parameter's own step ...
  int64_t global_step;  // ... unless this is not 0 ...
  const int64_t* ages;  // ... or there is one age per bucket, num_ages in all
  int64_t num_ages;
  int64_t draw;  // the Philox draw; -1: the parameter's own completed steps
  int32_t kind;  // MaskKind
  int32_t masked;  // Masked
  int32_t threshold;
  int32_t buckets, first_bucket, last_bucket;
  int32_t num_planes;  // -1: recompute buckets
  int32_t amsgrad;
  int32_t maximize;
  int32_t lr_at;            // NumberAt; on a CPU kHere
  int32_t weight_decay_at;  // likewise
  int32_t cautious;         // decays only what the update does not move away from 0
};

static_assert(sizeof(TensorRow) == 112 && sizeof(HyperRow) == 136, "tensor_table.py has the same sizes");

// The values that the prologue on a GPU derives from a TensorRow and its HyperRow for one step. A launch holds rows of
// one mask kind. Rows of kind keep or off may be among them; their values make that kind keep or drop everything.
struct StepRow {
  float lr_weight_decay, beta1, beta2, eps;
  float step_size, bias_correction2_sqrt, bias_correction2_sqrt_reciprocal;
  float factor;              // on kept gradients: sign, times the scale of bernoulli and fixed masks
  float deviation;           // kGaussian: standard deviation of the factor around 1
  uint32_t threshold, draw;  // draw: resolved, never -1; 0 for buckets
  uint32_t buckets, first_bucket, last_bucket;
  uint32_t flags;     // StepFlag
  uint32_t num_ages;  // entries of by_age in use, one per bucket; 0: use the scalars above
};

enum StepFlag : uint32_t {
  kSkipFlag = 1,    // nothing moves: found_inf
  kOffFlag = 2,     // the gradient counts as 0 and is not read
  kFrozenFlag = 4,  // dropped elements are not stored
  kDecayFlag = 8,   // weight_decay is not 0
};

constexpr int kChunk = 4096;    // elements of one tensor per block of a GPU
constexpr int kChunkBits = 40;  // an entry of a chunk list: tensor << kChunkBits | chunk number within the tensor

// One launch on a GPU. The pointers are device addresses. backends/cuda.py mirrors it.
struct LaunchSpec {
  const TensorRow* rows;
  const StepRow* step_rows;
  const float* by_age;       // [rows][age_stride][4]: step_size, bias_correction2_sqrt, its reciprocal, 0
  const int64_t* chunks;     // num_chunks entries
  const float* grad_scale;   // gradients are divided by it, and the quotients stored; null: they are not
  const float* clip_factor;  // and then multiplied by it; null: they are not
  int64_t num_chunks, age_stride;
  int32_t param_dtype, grad_dtype, moment_dtype;  // DType; params are masters with copies if grad_dtype is another
  int32_t stochastic;                             // bits of Stochastic: what is rounded up or down at random
  int32_t kind;    // MaskKind of its rows, except of those that keep or drop everything
  int32_t planes;  // kBucket: read from bit-planes, else drawn
  int32_t aligned;  // addresses are multiples of 16; eight elements from a multiple of 8 on share a Philox call
  int32_t amsgrad;
  int32_t frozen;  // some rows have kFrozenFlag
  int32_t update;  // all rows are masked by kMaskUpdate, or keep everything
  int32_t cautious;  // all rows decay cautiously
  int32_t ages;    // some rows have num_ages
};

static_assert(sizeof(StepRow) == 64 && sizeof(LaunchSpec) == 112, "the Python side has the same sizes");

}  // namespace graddrop
