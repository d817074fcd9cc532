// The kernels of the gradients' norm, their choice, the C function and its emulation on the host.
#include "export.h"
#include "norm.h"

namespace graddrop {

// The sum over the block, for thread 0. sums: kThreads numbers in shared memory.
__device__ double block_sum(double* sums, double mine) {
  sums[threadIdx.x] = mine;
  for (int adders = kAdded; adders; adders /= kAdded) {
    __syncthreads();
    add_up(sums, adders, threadIdx.x);
  }
  return sums[0];
}

// Counts a block as arrived, and returns the number of blocks that have. Releases the writes of this thread, and
// acquires those that earlier blocks have released. It is one instruction; two __threadfence() would each wait for
// more.
__device__ unsigned arrive(unsigned* arrived) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
  return before + 1;
}

// Writes the block's sum to its slot. The last block to do so adds up the slots in order, so that the total does not
// depend on which block is last.
__device__ void add_to_places(const Places& places, double mine) {
  __shared__ double sums[kThreads];
  const double sum = block_sum(sums, mine);
  bool last = false;
  if (threadIdx.x == 0) {
    places.sums[places.first + blockIdx.x] = sum;
    last = arrive(places.arrived) == places.total;
  }
  if (!__syncthreads_or(last)) return;
  const double total = block_sum(sums, sum_of_places(places, threadIdx.x));
  if (threadIdx.x) return;
  *places.out = total;
  *places.arrived = 0;
}

template <Variant kVariant, typename G>
__global__ void __launch_bounds__(kThreads)
    aligned_norm_kernel(const __grid_constant__ LaunchSpec spec, bool masked, const __grid_constant__ Places places) {
  add_to_places(places, aligned_squares<kVariant, G>(spec, masked, blockIdx.x, threadIdx.x));
}

template <typename G>
__global__ void __launch_bounds__(kThreads)
    general_norm_kernel(const __grid_constant__ LaunchSpec spec, bool masked, const __grid_constant__ Places places) {
  add_to_places(places, general_squares<G>(spec, masked, blockIdx.x, threadIdx.x));
}

static double emulate_block_sum(double* sums) {
  for (int adders = kAdded; adders; adders /= kAdded)
    for (int thread = 0; thread < kThreads; ++thread) add_up(sums, adders, thread);
  return sums[0];
}

// A kernel, and the sum of one of its threads on the host.
struct NormKernel {
  void (*on_device)(LaunchSpec spec, bool masked, Places places);
  double (*on_host)(const LaunchSpec& spec, bool masked, int block, int thread);
};

template <Variant kVariant, typename G>
static NormKernel aligned() {
  return {aligned_norm_kernel<kVariant, G>, aligned_squares<kVariant, G>};
}

// Frozen elements count as dropped, and ages do not matter.
template <typename G>
static NormKernel norm_kernel_for(const LaunchSpec& spec) {
  if (!spec.aligned) return {general_norm_kernel<G>, general_squares<G>};
  switch (spec.kind) {
    case kBernoulli: return aligned<kDraws, G>();
    case kGaussian: return aligned<kFactor, G>();
    case kBucket: return spec.planes ? aligned<kBits, G>() : aligned<kBuckets, G>();
    case kFixed: return aligned<kBits, G>();
    default: return aligned<kPlain, G>();
  }
}

static NormKernel norm_kernel_of(const LaunchSpec& spec) {
  switch (spec.grad_dtype) {
    case kBFloat16: return norm_kernel_for<BFloat16>(spec);
    case kFloat16: return norm_kernel_for<Float16>(spec);
    default: return norm_kernel_for<float>(spec);
  }
}

}  // namespace graddrop

using namespace graddrop;

// Adds up the squares of one launch's chunks. All launches together have `total` chunks; the last block of all writes
// *out. `first` is the number of chunks in the launches before this one. If not masked, gradients count as they are and
// spec->kind is kKeep.
// The relative error is at most (78 + ceil(total / 256)) 2^-53: 16 or 17 squares per thread, 15 + 15 additions per
// block, the slots of a thread of the last block, 15 + 15 additions. Returns a cudaError_t.
GRADDROP_EXPORT int32_t graddrop_cuda_sum_of_squares(const LaunchSpec* spec, int32_t masked, double* sums,
                                                     unsigned* arrived, double* out, int64_t first, int64_t total,
                                                     void* stream) {
  if (spec->num_chunks == 0) return cudaSuccess;
  norm_kernel_of(*spec).on_device<<<static_cast<unsigned>(spec->num_chunks), kThreads, 0,
                                    static_cast<cudaStream_t>(stream)>>>(*spec, masked != 0,
                                                                         {sums, arrived, out, first, total});
  return cudaGetLastError();
}

GRADDROP_EXPORT int32_t graddrop_cuda_emulate_sum_of_squares(const LaunchSpec* spec, int32_t masked, double* sums,
                                                             unsigned* arrived, double* out, int64_t first,
                                                             int64_t total, void*) {
  const NormKernel kernel = norm_kernel_of(*spec);
  const Places places = {sums, arrived, out, first, total};
  double of_threads[kThreads];
  for (int64_t block = 0; block < spec->num_chunks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread)
      of_threads[thread] = kernel.on_host(*spec, masked != 0, static_cast<int>(block), thread);
    sums[first + block] = emulate_block_sum(of_threads);
    if (++*arrived != total) continue;
    for (int thread = 0; thread < kThreads; ++thread) of_threads[thread] = sum_of_places(places, thread);
    *out = emulate_block_sum(of_threads);
    *arrived = 0;
  }
  return cudaSuccess;
}
