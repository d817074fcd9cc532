// The kernels of a step and the C functions that graddrop_kernels/backends/cuda.py calls. Each function has two forms.
// One runs on the device. The other emulates it: it runs the same source thread after thread on host memory.
#include "export.h"
#include "masked_adamw.h"
#include "step_row.h"

namespace graddrop {

// The number of blocks that a multiprocessor must hold. It bounds the registers to 80 per thread, or 128.
constexpr int min_blocks(Variant variant, bool amsgrad) {
  return amsgrad || by_age(variant) || variant == kFactor || variant == kBucketsUpdate ? 2 : 3;
}

template <Variant kVariant, bool kAmsgrad, bool kCautious, typename T>
__global__ void __launch_bounds__(kThreads, min_blocks(kVariant, kAmsgrad))
    aligned_kernel(const __grid_constant__ LaunchSpec spec) {
  aligned_thread<kVariant, kAmsgrad, kCautious, T>(spec, blockIdx.x, gridDim.x, threadIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) general_kernel(const __grid_constant__ LaunchSpec spec) {
  general_thread<T>(spec, blockIdx.x, gridDim.x, threadIdx.x);
}

constexpr int kPrologueThreads = 32;

// One block per tensor.
__global__ void __launch_bounds__(kPrologueThreads)
    prologue_kernel(const TensorRow* rows, const HyperRow* hypers, StepRow* step_rows, float* by_age,
                    int64_t age_stride, const float* found_inf, bool advance) {
  const int64_t tensor = blockIdx.x;
  float* const counter = rows[tensor].step;
  const HyperRow& hyper = hypers[rows[tensor].hyper];
  const int64_t completed_steps = static_cast<int64_t>(*counter);
  __syncthreads();  // all have read the counter before it advances
  const StepRow step = step_row_of(hyper, completed_steps, moves(hyper, found_inf), age_stride);
  for (int64_t bucket = threadIdx.x; bucket < step.num_ages; bucket += kPrologueThreads)
    write_age(hyper, completed_steps, bucket, by_age + (tensor * age_stride + bucket) * 4);
  if (threadIdx.x) return;
  step_rows[tensor] = step;
  if (advance && !(step.flags & kSkipFlag)) *counter += 1.0f;
}

static void emulate_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers, StepRow* step_rows,
                             float* by_age, int64_t age_stride, const float* found_inf, bool advance) {
  for (int64_t tensor = 0; tensor < num_rows; ++tensor) {
    const HyperRow& hyper = hypers[rows[tensor].hyper];
    const int64_t completed_steps = static_cast<int64_t>(*rows[tensor].step);
    const StepRow step = step_row_of(hyper, completed_steps, moves(hyper, found_inf), age_stride);
    for (int64_t bucket = 0; bucket < step.num_ages; ++bucket)
      write_age(hyper, completed_steps, bucket, by_age + (tensor * age_stride + bucket) * 4);
    step_rows[tensor] = step;
    if (advance && !(step.flags & kSkipFlag)) *rows[tensor].step += 1.0f;
  }
}

// A kernel, and the work of one of its threads on the host.
struct Kernel {
  void (*on_device)(LaunchSpec spec);
  void (*on_host)(const LaunchSpec& spec, int block, int num_blocks, int thread);
};

template <Variant kVariant, typename T>
static Kernel aligned(const LaunchSpec& spec) {
  if (spec.cautious) return {aligned_kernel<kVariant, false, true, T>, aligned_thread<kVariant, false, true, T>};
  if (spec.amsgrad) return {aligned_kernel<kVariant, true, false, T>, aligned_thread<kVariant, true, false, T>};
  return {aligned_kernel<kVariant, false, false, T>, aligned_thread<kVariant, false, false, T>};
}

template <typename T>
static Kernel kernel_for(const LaunchSpec& spec) {
  // both at once are rare, and would double the build
  if (!spec.aligned || (spec.amsgrad && spec.cautious)) return {general_kernel<T>, general_thread<T>};
  switch (spec.kind) {
    case kBernoulli:
      if (spec.update) return aligned<kDrawsUpdate, T>(spec);
      return spec.frozen ? aligned<kDrawsFrozen, T>(spec) : aligned<kDraws, T>(spec);
    case kGaussian: return aligned<kFactor, T>(spec);
    case kBucket:
      if (spec.update) return spec.planes ? aligned<kBitsUpdate, T>(spec) : aligned<kBucketsUpdate, T>(spec);
      if (!spec.planes) return spec.ages ? aligned<kBucketsByAge, T>(spec) : aligned<kBuckets, T>(spec);
      return spec.ages ? aligned<kBitsByAge, T>(spec) : aligned<kBits, T>(spec);
    case kFixed: return spec.update ? aligned<kBitsUpdate, T>(spec) : aligned<kBits, T>(spec);
    default: return aligned<kPlain, T>(spec);
  }
}

static Kernel kernel_of(const LaunchSpec& spec) {
  const bool wide_moments = spec.moment_dtype == kFloat32;
  switch (spec.param_dtype) {
    case kBFloat16:
      if (wide_moments && spec.stochastic) return kernel_for<Types<BFloat16, BFloat16, float, kRoundParams>>(spec);
      if (wide_moments) return kernel_for<Types<BFloat16, BFloat16, float>>(spec);
      switch (spec.stochastic) {
        case kRoundParams: return kernel_for<Types<BFloat16, BFloat16, BFloat16, kRoundParams>>(spec);
        case kRoundMoments: return kernel_for<Types<BFloat16, BFloat16, BFloat16, kRoundMoments>>(spec);
        case kRoundParams | kRoundMoments:
          return kernel_for<Types<BFloat16, BFloat16, BFloat16, kRoundParams | kRoundMoments>>(spec);
        default: return kernel_for<Types<BFloat16, BFloat16, BFloat16>>(spec);
      }
    case kFloat16:
      if (wide_moments) return kernel_for<Types<Float16, Float16, float>>(spec);
      return kernel_for<Types<Float16, Float16, Float16>>(spec);
    default:
      if (spec.grad_dtype == kBFloat16) return kernel_for<Types<float, BFloat16, float>>(spec);
      if (spec.grad_dtype == kFloat16) return kernel_for<Types<float, Float16, float>>(spec);
      if (wide_moments) return kernel_for<Types<float, float, float>>(spec);
      if (spec.stochastic) return kernel_for<Types<float, float, BFloat16, kRoundMoments>>(spec);
      return kernel_for<Types<float, float, BFloat16>>(spec);
  }
}

}  // namespace graddrop

using namespace graddrop;

GRADDROP_EXPORT int32_t graddrop_cuda_table_version() { return kTableVersion; }

// The architectures that the library has code for, as setup.py asked nvcc: "sm_80+sm_90+compute_90", the last of these
// as PTX.
#define GRADDROP_TEXT(tokens) #tokens
#define GRADDROP_TEXT_OF(macro) GRADDROP_TEXT(macro)
GRADDROP_EXPORT const char* graddrop_cuda_architectures() { return GRADDROP_TEXT_OF(GRADDROP_CUDA_ARCHITECTURES); }

// CUDA's versions, 1000 * major + 10 * minor: that which the library was built with, and the newest that the driver
// supports, 0 without a driver.
GRADDROP_EXPORT int32_t graddrop_cuda_runtime_version() { return CUDART_VERSION; }
GRADDROP_EXPORT int32_t graddrop_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

GRADDROP_EXPORT const char* graddrop_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Fills step_rows for one step, and by_age unless age_stride is 0. With advance it also counts the step in the step
// counters. Returns a cudaError_t, as all of these functions do.
GRADDROP_EXPORT int32_t graddrop_cuda_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                               StepRow* step_rows, float* by_age, int64_t age_stride,
                                               const float* found_inf, int32_t advance, void* stream) {
  if (num_rows == 0) return cudaSuccess;
  prologue_kernel<<<static_cast<unsigned>(num_rows), kPrologueThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      rows, hypers, step_rows, by_age, age_stride, found_inf, advance != 0);
  return cudaGetLastError();
}

GRADDROP_EXPORT int32_t graddrop_cuda_emulate_prologue(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                                       StepRow* step_rows, float* by_age, int64_t age_stride,
                                                       const float* found_inf, int32_t advance, void*) {
  emulate_prologue(rows, num_rows, hypers, step_rows, by_age, age_stride, found_inf, advance != 0);
  return cudaSuccess;
}

// Makes a masked AdamW step on the chunks of one launch.
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
