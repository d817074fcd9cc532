// The functions that one instruction set offers to masked_adamw.cpp: one table per translation unit.
#pragma once
#include "../adamw.h"
#include "../mask.h"
#include "../stochastic.h"
#include "../tensor_table.h"

namespace graddrop {

// The scalars that depend on the age of a bucket. There is one entry per bucket, and memory for at least 64.
struct AgeTables {
  const float *step_size, *bias_correction2_sqrt, *bias_correction2_sqrt_reciprocal;
};

// The values that all rows of a call share.
struct Mode {
  DType param_dtype, grad_dtype, moment_dtype;
  int32_t stochastic;        // bits of Stochastic: what is rounded up or down at random
  const float* grad_scale;   // gradients are divided by it and written back; null: they are not
  const float* clip_factor;  // and then multiplied by it; null: they are not
};

// A TensorRow with all values computed that do not change from element to element.
struct PreparedRow {
  TensorRow tensor;
  MaskSpec mask;
  AdamWScalars<float> scalars;
  AgeTables by_age;  // num_ages entries; with num_ages = 0 the scalars above are used
  int64_t num_ages;
  Mode mode;
  uint32_t rounding_draw;  // third counter word of stochastic rounding
  Decay decay;
  bool amsgrad;
  float sign;  // -1 to maximize
};

// The rows of a matrix [a, b] that are a tile: 64, or as many times 64 as have b bits side by side in 64.
constexpr int64_t tile_rows(int64_t b) { return b > 32 ? 64 : 64 * (64 / b); }

struct Kernels {
  const char* isa;
  // One step on the elements [begin, end) of a row, local flat indices.
  void (*masked_adamw)(const PreparedRow& row, int64_t begin, int64_t end);
  // The sum of the squares of the gradients [begin, end) in float64, with masked after their mask.
  double (*sum_of_squares)(const PreparedRow& row, bool masked, int64_t begin, int64_t end);
  // Masks the gradients [begin, end) in place. Nothing else of the row is read.
  void (*mask_gradients)(const PreparedRow& row, int64_t begin, int64_t end);
  // The 16-bit draws of elements first .. first + count of a stream.
  void (*uniform16)(uint64_t key, uint32_t draw, uint32_t domain, int64_t first, int64_t count, uint16_t* out);
  // Bit-planes of the buckets of local elements [begin, end); begin is a multiple of 32.
  void (*bucket_planes)(const TensorRow& row, uint32_t buckets, int num_planes, int64_t begin, int64_t end,
                        uint32_t* planes);
  // The bits of a drawn mask, or the bit-planes of its buckets, in the order of memory, for the tiles [begin, end) of a
  // tensor that holds [b, a] for each matrix [a, b]; see memory_order.h.
  void (*memory_order_planes)(const PreparedRow& row, int64_t a, int64_t b, int num_planes, int64_t begin, int64_t end,
                              uint32_t* planes);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
#endif

}  // namespace graddrop
