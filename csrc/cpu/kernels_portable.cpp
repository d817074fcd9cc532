// The kernels for any processor, one element at a time.
// clang-format off
#include "simd_portable.h"
#include "mask_gradients.h"
#include "memory_order.h"
#include "squares.h"
#include "update.h"
// clang-format on

namespace graddrop {
extern const Kernels kPortableKernels = {"portable", masked_adamw, sum_of_squares, mask_gradients, uniform16,
    bucket_planes, memory_order_planes};
}  // namespace graddrop
