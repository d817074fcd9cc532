// What one instruction set offers to masked_adamw.cpp: a table of functions, one table a translation unit.
#pragma once
#include "../adamw.h"
#include "../mask.h"
#include "../tensor_table.h"

namespace graddrop {

// A TensorRow with everything that does not change from element to element worked out.
struct PreparedRow {
  TensorRow tensor;
  MaskSpec mask;
  AdamWScalars<float> scalars;
  // One entry a bucket (num_ages of them, in room for at least 16), or num_ages = 0: then the two scalars count.
  const float* step_sizes;
  const float* bias_corrections2_sqrt;
  int64_t num_ages;
  DType param_dtype, moment_dtype;
  bool decay, amsgrad;
  float sign;  // -1 to maximize
};

struct Kernels {
  const char* isa;
  // One step on the elements [begin, end) of a row, local flat indices.
  void (*masked_adamw)(const PreparedRow& row, int64_t begin, int64_t end);
  // The 16-bit draws of elements first .. first + count of a stream.
  void (*uniform16)(uint64_t key, uint32_t draw, uint32_t domain, int64_t first, int64_t count, uint16_t* out);
  // Bit-planes of the buckets of local elements [begin, end); begin is a multiple of 32.
  void (*bucket_planes)(const TensorRow& row, uint32_t buckets, int num_planes, int64_t begin, int64_t end, uint32_t* planes);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace graddrop
