// The kernels for processors with AVX2, FMA and F16C.
// clang-format off
#include "simd_avx2.h"
#include "mask_gradients.h"
#include "memory_order.h"
#include "squares.h"
#include "update.h"
// clang-format on

namespace graddrop {
extern const Kernels kAvx2Kernels = {"avx2", masked_adamw, sum_of_squares, mask_gradients, uniform16,
    bucket_planes, memory_order_planes};
}  // namespace graddrop
