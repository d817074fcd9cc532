// The kernels for processors with AVX-512 F, BW, VL, DQ and BF16.
// clang-format off
#include "simd_avx512.h"
#include "mask_gradients.h"
#include "memory_order.h"
#include "squares.h"
#include "update.h"
// clang-format on

namespace graddrop {
extern const Kernels kAvx512Bf16Kernels = {"avx512_bf16", masked_adamw, sum_of_squares, mask_gradients, uniform16,
    bucket_planes, memory_order_planes};
}  // namespace graddrop
