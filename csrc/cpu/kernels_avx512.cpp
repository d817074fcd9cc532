// The kernels for processors with AVX-512 F, BW, VL and DQ.
// clang-format off
#include "simd_avx512.h"
#include "mask_gradients.h"
#include "memory_order.h"
#include "squares.h"
#include "update.h"
// clang-format on

namespace graddrop {
extern const Kernels kAvx512Kernels = {"avx512", masked_adamw, sum_of_squares, mask_gradients, uniform16,
    bucket_planes, memory_order_planes};
}  // namespace graddrop
