// The kernels that write masks and bit-planes, and their C functions. Each has an emulation on the host.
#include "export.h"
#include "masks.h"

namespace graddrop {

constexpr int kMaskThreads = 256;

__global__ void __launch_bounds__(kMaskThreads)
    keep_mask_kernel(const __grid_constant__ TensorRow row, const __grid_constant__ MaskSpec mask, uint8_t* out) {
  write_bytes(row, mask, static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x, out);
}

__global__ void __launch_bounds__(kMaskThreads)
    planes_kernel(const __grid_constant__ TensorRow row, uint32_t buckets, int num_planes, uint32_t* planes) {
  write_planes(row, buckets, num_planes, static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x, planes);
}

static unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kMaskThreads - 1) / kMaskThreads);
}

}  // namespace graddrop

using namespace graddrop;

// In all of these functions row and mask are in host memory and are copied. out, and the memory that row points to, are
// on the device. They return a cudaError_t.

// One byte per element, 0 or 1, as torch.bool. The address out is a multiple of 16.
GRADDROP_EXPORT int32_t graddrop_cuda_keep_mask(const TensorRow* row, const MaskSpec* mask, uint8_t* out,
                                                void* stream) {
  if (row->numel == 0) return cudaSuccess;
  keep_mask_kernel<<<blocks_for((row->numel + 15) / 16), kMaskThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      *row, *mask, out);
  return cudaGetLastError();
}
GRADDROP_EXPORT int32_t graddrop_cuda_emulate_keep_mask(const TensorRow* row, const MaskSpec* mask, uint8_t* out,
                                                        void*) {
  for (int64_t t = 0; t < (row->numel + 15) / 16; ++t) write_bytes(*row, *mask, t, out);
  return cudaSuccess;
}

// Bit-planes of the tensor's buckets: num_planes arrays of ceil(numel / 32) words.
GRADDROP_EXPORT int32_t graddrop_cuda_bucket_planes(const TensorRow* row, int64_t buckets, int64_t num_planes,
                                                    uint32_t* planes, void* stream) {
  if (row->numel == 0 || num_planes == 0) return cudaSuccess;
  planes_kernel<<<blocks_for(words_of(*row)), kMaskThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      *row, static_cast<uint32_t>(buckets), static_cast<int>(num_planes), planes);
  return cudaGetLastError();
}
GRADDROP_EXPORT int32_t graddrop_cuda_emulate_bucket_planes(const TensorRow* row, int64_t buckets, int64_t num_planes,
                                                            uint32_t* planes, void*) {
  for (int64_t word = 0; word < words_of(*row); ++word)
    write_planes(*row, static_cast<uint32_t>(buckets), static_cast<int>(num_planes), word, planes);
  return cudaSuccess;
}
