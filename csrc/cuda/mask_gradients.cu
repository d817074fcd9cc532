// The kernels that mask gradients in place, their choice, the C function and its emulation on the host.
#include "export.h"
#include "mask_gradients.h"

namespace graddrop {

template <Variant kVariant, typename G>
__global__ void __launch_bounds__(kThreads) aligned_masks_kernel(const __grid_constant__ LaunchSpec spec) {
  aligned_masks<kVariant, G>(spec, blockIdx.x, threadIdx.x);
}

template <typename G>
__global__ void __launch_bounds__(kThreads) general_masks_kernel(const __grid_constant__ LaunchSpec spec) {
  general_masks<G>(spec, blockIdx.x, threadIdx.x);
}

// A kernel, and the work of one of its threads on the host.
struct MasksKernel {
  void (*on_device)(LaunchSpec spec);
  void (*on_host)(const LaunchSpec& spec, int block, int thread);
};

template <Variant kVariant, typename G>
static MasksKernel aligned_of() {
  return {aligned_masks_kernel<kVariant, G>, aligned_masks<kVariant, G>};
}

template <typename G>
static MasksKernel masks_kernel_for(const LaunchSpec& spec) {
  if (!spec.aligned) return {general_masks_kernel<G>, general_masks<G>};
  switch (spec.kind) {
    case kBernoulli: return aligned_of<kDraws, G>();
    case kGaussian: return aligned_of<kFactor, G>();
    case kBucket: return spec.planes ? aligned_of<kBits, G>() : aligned_of<kBuckets, G>();
    case kFixed: return aligned_of<kBits, G>();
    default: return aligned_of<kPlain, G>();
  }
}

static MasksKernel masks_kernel_of(const LaunchSpec& spec) {
  switch (spec.grad_dtype) {
    case kBFloat16: return masks_kernel_for<BFloat16>(spec);
    case kFloat16: return masks_kernel_for<Float16>(spec);
    default: return masks_kernel_for<float>(spec);
  }
}

}  // namespace graddrop

using namespace graddrop;

// Masks the gradients of one launch's chunks in place. Rows that keep everything are in no launch; a launch of kind kKeep
// holds dropped blocks, whose gradients become 0 and are not read. Returns a cudaError_t.
GRADDROP_EXPORT int32_t graddrop_cuda_mask_gradients(const LaunchSpec* spec, void* stream) {
  if (spec->num_chunks == 0) return cudaSuccess;
  masks_kernel_of(*spec).on_device<<<static_cast<unsigned>(spec->num_chunks), kThreads, 0,
                                     static_cast<cudaStream_t>(stream)>>>(*spec);
  return cudaGetLastError();
}

GRADDROP_EXPORT int32_t graddrop_cuda_emulate_mask_gradients(const LaunchSpec* spec, void*) {
  const MasksKernel kernel = masks_kernel_of(*spec);
  for (int64_t block = 0; block < spec->num_chunks; ++block)
    for (int thread = 0; thread < kThreads; ++thread) kernel.on_host(*spec, static_cast<int>(block), thread);
  return cudaSuccess;
}
