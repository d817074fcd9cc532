// The shared headers on the device, in their plainest form: one thread updates the eight elements of one Philox call.
// float32 rows with drawn masks.
// It keeps the headers fit for nvcc. Compiled and inspected only; it has not run on a GPU, and no backend uses it yet.
#include "../adamw.h"
#include "../gaussian.h"
#include "../mask.h"
#include "../tensor_table.h"

namespace graddrop {

constexpr int kElementsPerThread = 8;
constexpr int kThreads = 256;

__global__ void masked_adamw_float32(TensorRow row, MaskSpec mask, AdamWScalars<float> scalars, bool decay,
                                     bool amsgrad, float sign) {
  const int64_t call = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = call * kElementsPerThread;
  if (first >= row.numel) return;
  const uint32_t domain = mask.kind == kBucket ? kDomainBucket : kDomainElement;
  const PhiloxWords words = philox_call(static_cast<uint64_t>(call), mask.draw, domain, mask.key);
  float* params = static_cast<float*>(row.param);
  float* exp_avgs = static_cast<float*>(row.exp_avg);
  float* exp_avg_sqs = static_cast<float*>(row.exp_avg_sq);
  float* max_exp_avg_sqs = static_cast<float*>(row.max_exp_avg_sq);
  for (int lane = 0; lane < kElementsPerThread && first + lane < row.numel; ++lane) {
    const int64_t i = first + lane;
    bool keep = true;
    float factor = sign;
    if (mask.kind == kBernoulli) keep = uniform16(words, lane) >= mask.threshold;
    if (mask.kind == kBucket) keep = bucket_active(bucket_of(uniform16(words, lane), mask.buckets), mask);
    if (mask.kind == kGaussian) {
      const PhiloxWords wide = philox_call(static_cast<uint64_t>(i) >> 2, mask.draw, kDomainGaussian, mask.key);
      factor *= fma(normal_from_uniform(symmetric_uniform(wide.word[i & 3])), mask.scale, 1.0f);
    } else {
      factor *= mask.scale;
    }
    if (!keep && mask.frozen) continue;
    AdamWElement<float> e = {exp_avgs[i], exp_avg_sqs[i], amsgrad ? max_exp_avg_sqs[i] : 0.0f};
    const float g = keep ? static_cast<const float*>(row.grad)[i] * factor : 0.0f;
    const AdamWDirection<float> direction = adamw_moments(e, g, scalars, amsgrad);
    params[i] = adamw_param(params[i], direction, scalars, decay);
    exp_avgs[i] = e.exp_avg;
    exp_avg_sqs[i] = e.exp_avg_sq;
    if (amsgrad) max_exp_avg_sqs[i] = e.max_exp_avg_sq;
  }
}

}  // namespace graddrop

using namespace graddrop;

extern "C" __attribute__((visibility("default"))) int32_t graddrop_cuda_table_version() { return kTableVersion; }

// One row on a stream; returns the cudaError_t of the launch.
extern "C" __attribute__((visibility("default"))) int32_t
graddrop_cuda_masked_adamw_float32(const TensorRow* row, const MaskSpec* mask, const AdamWScalars<float>* scalars,
                                   int32_t decay, int32_t amsgrad, float sign, void* stream) {
  const int64_t calls = (row->numel + kElementsPerThread - 1) / kElementsPerThread;
  if (calls == 0) return 0;
  const unsigned blocks = static_cast<unsigned>((calls + kThreads - 1) / kThreads);
  masked_adamw_float32<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*row, *mask, *scalars, decay,
                                                                                   amsgrad, sign);
  return static_cast<int32_t>(cudaGetLastError());
}
