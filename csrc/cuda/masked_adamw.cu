// The kernels of a step and the C functions that graddrop_kernels/backends/cuda.py calls. Each function comes in two
// forms: on the device, and as an emulation on the host, which runs the same text thread after thread on host memory.
#include "export.h"
#include "masked_adamw.h"
#include "step_row.h"

namespace graddrop {

// Blocks that a multiprocessor shall hold: bounds the registers to 80 a thread, or 128.
constexpr int min_blocks(Variant variant, bool amsgrad) { return amsgrad || by_age(variant) ? 2 : 3; }

template <Variant kVariant, bool kAmsgrad, typename P, typename M>
__global__ void __launch_bounds__(kThreads, min_blocks(kVariant, kAmsgrad))
    aligned_kernel(const __grid_constant__ LaunchSpec spec) {
  aligned_thread<kVariant, kAmsgrad, P, M>(spec, blockIdx.x, gridDim.x, threadIdx.x);
}

template <typename P, typename M>
__global__ void __launch_bounds__(kThreads) general_kernel(const __grid_constant__ LaunchSpec spec) {
  general_thread<P, M>(spec, blockIdx.x, gridDim.x, threadIdx.x);
}

constexpr int kPrologueThreads = 32;

// One block a tensor.
__global__ void __launch_bounds__(kPrologueThreads)
    prologue_kernel(const TensorRow* rows, const HyperRow* hypers, StepRow* step_rows, float* by_age,
                    int64_t age_stride, const float* found_inf) {
  const int64_t tensor = blockIdx.x;
  float* const counter = rows[tensor].step;
  const HyperRow& hyper = hypers[rows[tensor].hyper];
  const int64_t completed_steps = static_cast<int64_t>(*counter);
  __syncthreads();  // all have read the counter before it moves
  const StepRow step = step_row_of(hyper, completed_steps, moves(hyper, found_inf), age_stride);
  for (int64_t bucket = threadIdx.x; bucket < step.num_ages; bucket += kPrologueThreads)
    write_age(hyper, completed_steps, bucket, by_age + (tensor * age_stride + bucket) * 4);
  if (threadIdx.x) return;
  step_rows[tensor] = step;
  if (!(step.flags & kSkipFlag)) *counter += 1.0f;
}

static void emulate_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers, StepRow* step_rows,
                             float* by_age, int64_t age_stride, const float* found_inf) {
  for (int64_t tensor = 0; tensor < num_rows; ++tensor) {
    const HyperRow& hyper = hypers[rows[tensor].hyper];
    const int64_t completed_steps = static_cast<int64_t>(*rows[tensor].step);
    const StepRow step = step_row_of(hyper, completed_steps, moves(hyper, found_inf), age_stride);
    for (int64_t bucket = 0; bucket < step.num_ages; ++bucket)
      write_age(hyper, completed_steps, bucket, by_age + (tensor * age_stride + bucket) * 4);
    step_rows[tensor] = step;
    if (!(step.flags & kSkipFlag)) *rows[tensor].step += 1.0f;
  }
}

// A kernel, and what one of its threads does on the host.
struct Kernel {
  void (*on_device)(LaunchSpec spec);
  void (*on_host)(const LaunchSpec& spec, int block, int num_blocks, int thread);
};

template <Variant kVariant, typename P, typename M>
static Kernel aligned(const LaunchSpec& spec) {
  if (spec.amsgrad) return {aligned_kernel<kVariant, true, P, M>, aligned_thread<kVariant, true, P, M>};
  return {aligned_kernel<kVariant, false, P, M>, aligned_thread<kVariant, false, P, M>};
}

template <typename P, typename M>
static Kernel kernel_for(const LaunchSpec& spec) {
  if (!spec.aligned) return {general_kernel<P, M>, general_thread<P, M>};
  switch (spec.kind) {
    case kBernoulli: return spec.frozen ? aligned<kDrawsFrozen, P, M>(spec) : aligned<kDraws, P, M>(spec);
    case kGaussian: return aligned<kFactor, P, M>(spec);
    case kBucket:
      if (!spec.planes) return spec.ages ? aligned<kBucketsByAge, P, M>(spec) : aligned<kBuckets, P, M>(spec);
      return spec.ages ? aligned<kBitsByAge, P, M>(spec) : aligned<kBits, P, M>(spec);
    case kFixed: return aligned<kBits, P, M>(spec);
    default: return aligned<kPlain, P, M>(spec);
  }
}

static Kernel kernel_of(const LaunchSpec& spec) {
  const bool wide_moments = spec.moment_dtype == kFloat32;
  switch (spec.param_dtype) {
    case kBFloat16: return wide_moments ? kernel_for<BFloat16, float>(spec) : kernel_for<BFloat16, BFloat16>(spec);
    case kFloat16: return wide_moments ? kernel_for<Float16, float>(spec) : kernel_for<Float16, Float16>(spec);
    default: return kernel_for<float, float>(spec);
  }
}

}  // namespace graddrop

using namespace graddrop;

GRADDROP_EXPORT int32_t graddrop_cuda_table_version() { return kTableVersion; }

GRADDROP_EXPORT const char* graddrop_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Fills step_rows and by_age for one step and advances the step counters. Returns a cudaError_t, as all of these do.
GRADDROP_EXPORT int32_t graddrop_cuda_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                               StepRow* step_rows, float* by_age, int64_t age_stride,
                                               const float* found_inf, void* stream) {
  if (num_rows == 0) return cudaSuccess;
  prologue_kernel<<<static_cast<unsigned>(num_rows), kPrologueThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rows, hypers, step_rows, by_age, age_stride, found_inf);
  return cudaGetLastError();
}

GRADDROP_EXPORT int32_t graddrop_cuda_emulate_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                                       StepRow* step_rows, float* by_age, int64_t age_stride,
                                                       const float* found_inf, void*) {
  emulate_prologue(rows, num_rows, hypers, step_rows, by_age, age_stride, found_inf);
  return cudaSuccess;
}

// One launch: a masked AdamW step on its chunks.
GRADDROP_EXPORT int32_t graddrop_cuda_masked_adamw(const LaunchSpec* spec, void* stream) {
  if (spec->num_chunks == 0) return cudaSuccess;
  kernel_of(*spec).on_device<<<static_cast<unsigned>(spec->num_chunks), kThreads, 0,
                               static_cast<cudaStream_t>(stream)>>>(*spec);
  return cudaGetLastError();
}

GRADDROP_EXPORT int32_t graddrop_cuda_emulate_masked_adamw(const LaunchSpec* spec, void*) {
  const Kernel kernel = kernel_of(*spec);
  const int blocks = static_cast<int>(spec->num_chunks);
  for (int block = 0; block < blocks; ++block)
    for (int thread = 0; thread < kThreads; ++thread) kernel.on_host(*spec, block, blocks, thread);
  return cudaSuccess;
}
