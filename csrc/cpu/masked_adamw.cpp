// The C functions that graddrop_kernels/backends/cpu.py calls: the choice of instruction set, the scalars of each row,
// the division among threads.
// It includes no header of torch or Python. Python passes the address of torch_parallel_for (torch's stable C ABI,
// torch >= 2.10) at load time. So one library serves every torch and every Python, and our threads are torch's own.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

#define GRADDROP_EXPORT extern "C" __attribute__((visibility("default")))

namespace graddrop {
namespace {

// elements that a thread takes at a time: 64 KB of float32 streams, so that thread ends and tails are rare
constexpr int64_t kUnit = 4096;
constexpr int64_t kGrainUnits = 8;  // 32768 elements: below that, one thread is faster than waking two

using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);
ParallelFor parallel_for = nullptr;

bool supported(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&kernels == &kAvx512Bf16Kernels) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (&kernels == &kAvx512Kernels) return avx512;
  if (&kernels == &kAvx2Kernels) return avx2;
#endif
  return &kernels == &kPortableKernels;
}

const Kernels* const kAllKernels[] = {
#if defined(__x86_64__)
    &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels};

const Kernels* best() {
  for (const Kernels* kernels : kAllKernels)
    if (supported(*kernels)) return kernels;
  return nullptr;
}
const Kernels* chosen = best();

// The scalars that depend on the step. Bias corrections are computed in float64 from the float32-rounded betas and
// rounded once; the rest is float32 as in torch's kernel.
struct StepScalars {
  float step_size, bias_correction2_sqrt, bias_correction2_sqrt_reciprocal;
};
float scale_of_update(const HyperRow& hyper) {
  return hyper.masked == kMaskUpdate ? static_cast<float>(hyper.scale) : 1.0f;
}
StepScalars step_scalars(const HyperRow& hyper, double age) {
  const double beta1 = static_cast<float>(hyper.beta1), beta2 = static_cast<float>(hyper.beta2);
  const float bias_correction1 = static_cast<float>(1.0 - std::pow(beta1, age));
  const float bias_correction2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, age)));
  return {static_cast<float>(hyper.lr) / bias_correction1 * scale_of_update(hyper), bias_correction2_sqrt, 1.0f / bias_correction2_sqrt};
}

// Computes everything of a row except its bias corrections.
PreparedRow prepare(const TensorRow& row, const HyperRow& hyper, int64_t completed_steps, const Mode& mode) {
  PreparedRow prepared = {};
  const int64_t draw = hyper.kind == kBucket ? 0 : hyper.draw < 0 ? completed_steps : hyper.draw;
  prepared.tensor = row;
  prepared.mask = {hyper.kind,
                   hyper.masked,
                   static_cast<uint32_t>(hyper.threshold),
                   static_cast<uint32_t>(draw),
                   static_cast<uint32_t>(hyper.buckets),
                   static_cast<uint32_t>(hyper.first_bucket),
                   static_cast<uint32_t>(hyper.last_bucket),
                   hyper.num_planes,
                   row.key,
                   hyper.masked == kMaskUpdate ? 1.0f : static_cast<float>(hyper.scale)};
  prepared.scalars.lr_weight_decay = static_cast<float>(hyper.lr) * static_cast<float>(hyper.weight_decay);
  prepared.scalars.beta1 = static_cast<float>(hyper.beta1);
  prepared.scalars.beta2 = static_cast<float>(hyper.beta2);
  prepared.scalars.eps = static_cast<float>(hyper.eps);
  prepared.mode = mode;
  prepared.rounding_draw = static_cast<uint32_t>(completed_steps);
  prepared.decay = hyper.weight_decay == 0 ? kNoDecay : hyper.cautious ? kCautiousDecay : kPlainDecay;
  prepared.amsgrad = hyper.amsgrad;
  prepared.sign = hyper.maximize ? -1.0f : 1.0f;
  return prepared;
}

struct Work {
  std::vector<PreparedRow> rows;
  std::vector<int64_t> first_unit = {0};  // of each row, and of the row that is added next
  const Kernels* kernels = chosen;
  void (*kernel)(const PreparedRow& row, int64_t begin, int64_t end) = nullptr;  // of run_units

  explicit Work(int64_t num_rows) {
    rows.reserve(num_rows);
    first_unit.reserve(num_rows + 1);
  }
  void add(const PreparedRow& row) {
    rows.push_back(row);
    first_unit.push_back(units() + (row.tensor.numel + kUnit - 1) / kUnit);
  }
  int64_t units() const { return first_unit.back(); }
  size_t row_of(int64_t unit) const {
    return std::upper_bound(first_unit.begin(), first_unit.end(), unit) - first_unit.begin() - 1;
  }
};

void run_units(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  for (size_t row = work.row_of(begin); begin < end; ++row) {
    const int64_t stop = std::min(end, work.first_unit[row + 1]), numel = work.rows[row].tensor.numel;
    if (begin == stop) continue;  // an empty tensor
    const int64_t first = (begin - work.first_unit[row]) * kUnit, last = (stop - work.first_unit[row]) * kUnit;
    work.kernel(work.rows[row], first, std::min(last, numel));
    begin = stop;
  }
}

struct SquaresWork : Work {
  using Work::Work;
  bool masked;
  std::vector<double> sums;  // one per unit
};

void sum_units(int64_t begin, int64_t end, void* context) {
  SquaresWork& work = *static_cast<SquaresWork*>(context);
  for (size_t row = work.row_of(begin); begin < end; ++begin) {
    while (work.first_unit[row + 1] <= begin) ++row;
    const int64_t first = (begin - work.first_unit[row]) * kUnit;
    work.sums[begin] = work.kernels->sum_of_squares(work.rows[row], work.masked, first,
                                                    std::min(first + kUnit, work.rows[row].tensor.numel));
  }
}

void run(int64_t count, int64_t grain, Range range, void* context) {
  if (count <= grain) range(0, count, context);
  else parallel_for(0, count, grain, range, context);
}

}  // namespace
}  // namespace graddrop

using namespace graddrop;

GRADDROP_EXPORT int32_t graddrop_cpu_table_version() { return kTableVersion; }

GRADDROP_EXPORT void graddrop_cpu_set_parallel_for(void* function) {
  parallel_for = reinterpret_cast<ParallelFor>(function);
}

// The instruction set in use. select_isa takes its name, or "" for the best. It returns 0, or -1 if this processor or
// this build has no such kernels.
GRADDROP_EXPORT const char* graddrop_cpu_isa() { return chosen->isa; }
GRADDROP_EXPORT int32_t graddrop_cpu_select_isa(const char* name) {
  for (const Kernels* kernels : kAllKernels)
    if (supported(*kernels) && (!*name || !std::strcmp(name, kernels->isa))) {
      chosen = kernels;
      return 0;
    }
  return -1;
}

// Makes one masked AdamW step on every row and advances the step counts.
// Each row is divided into units, and all units among the threads of torch's pool. grad_scale and clip_factor may be
// null. If the gradients' dtype is not the parameters', the parameters are masters, and all rows have copies.
GRADDROP_EXPORT void graddrop_cpu_masked_adamw(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                               int32_t param_dtype, int32_t grad_dtype, int32_t moment_dtype,
                                               int32_t stochastic, const float* grad_scale, const float* clip_factor) {
  const Mode mode = {static_cast<DType>(param_dtype), static_cast<DType>(grad_dtype), static_cast<DType>(moment_dtype),
                     stochastic, grad_scale, clip_factor};
  Work work(num_rows);
  work.kernel = chosen->masked_adamw;
  // per-bucket scalars; the inner buffers do not move when the outer vector grows
  std::vector<std::vector<float>> tables;
  int64_t last_steps = -1, last_hyper = -1;
  for (int64_t i = 0; i < num_rows; ++i) {
    const HyperRow& hyper = hypers[rows[i].hyper];
    if (hyper.kind == kOff && hyper.masked == kMaskFrozen) continue;  // nothing changes, nor does its step count
    const int64_t completed_steps = static_cast<int64_t>(*rows[i].step);
    *rows[i].step += 1.0f;
    work.add(prepare(rows[i], hyper, completed_steps, mode));
    PreparedRow& row = work.rows.back();
    if (completed_steps == last_steps && rows[i].hyper == last_hyper) {
      // as in the row before: saves two pow() and a table
      const PreparedRow& before = work.rows[work.rows.size() - 2];
      row.scalars = before.scalars;
      row.by_age = before.by_age;
    } else if (hyper.num_ages) {
      const int64_t room = std::max<int64_t>(hyper.buckets, 64);  // lookup() reads whole registers
      tables.emplace_back(3 * room, 1.0f);
      float* table = tables.back().data();
      for (int64_t bucket = 0; bucket < hyper.num_ages; ++bucket) {
        const StepScalars s = step_scalars(
            hyper, static_cast<double>(std::min(std::max<int64_t>(hyper.ages[bucket], 1), completed_steps + 1)));
        table[bucket] = s.step_size;
        table[room + bucket] = s.bias_correction2_sqrt;
        table[2 * room + bucket] = s.bias_correction2_sqrt_reciprocal;
      }
      row.by_age = {table, table + room, table + 2 * room};
    } else {
      const StepScalars s =
          step_scalars(hyper, hyper.global_step ? static_cast<double>(hyper.global_step)
                                                : 1.0 + static_cast<double>(completed_steps) * hyper.age_rate);
      row.scalars.step_size = s.step_size;
      row.scalars.bias_correction2_sqrt = s.bias_correction2_sqrt;
      row.scalars.bias_correction2_sqrt_reciprocal = s.bias_correction2_sqrt_reciprocal;
    }
    row.num_ages = hyper.num_ages ? hyper.buckets : 0;
    last_steps = completed_steps;
    last_hyper = rows[i].hyper;
  }
  run(work.units(), kGrainUnits, run_units, &work);
}

// Masks all gradients in place as the next step would, and changes nothing else. Of a row it reads the gradient, the step
// count, the layout, the key and the stored mask.
GRADDROP_EXPORT void graddrop_cpu_mask_gradients(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                                 int32_t grad_dtype) {
  Mode mode = {};
  mode.grad_dtype = static_cast<DType>(grad_dtype);
  Work work(num_rows);
  work.kernel = chosen->mask_gradients;
  for (int64_t i = 0; i < num_rows; ++i)
    if (hypers[rows[i].hyper].kind != kKeep)
      work.add(prepare(rows[i], hypers[rows[i].hyper], static_cast<int64_t>(*rows[i].step), mode));
  run(work.units(), kGrainUnits, run_units, &work);
}

// The sum of the squares of all gradients as they are, or with masked after the masks of the next step.
// It is float64 throughout, of exact squares. Each unit has 16 sums, which are added; the sums of the units are added
// in order, so that the number of threads does not matter. The relative error is at most (number of units + 272) 2^-53,
// which is 3e-11 for 10^9 elements.
GRADDROP_EXPORT double graddrop_cpu_sum_of_squares(const TensorRow* rows, int64_t num_rows, const HyperRow* hypers,
                                                   int32_t grad_dtype, int32_t masked) {
  Mode mode = {};
  mode.grad_dtype = static_cast<DType>(grad_dtype);
  SquaresWork work(num_rows);
  work.masked = masked != 0;
  for (int64_t i = 0; i < num_rows; ++i)
    work.add(prepare(rows[i], hypers[rows[i].hyper], static_cast<int64_t>(*rows[i].step), mode));
  work.sums.resize(work.units());
  run(work.units(), kGrainUnits, sum_units, &work);
  double total = 0;
  for (double sum : work.sums) total += sum;
  return total;
}

// The 16-bit draws of elements first .. first + count of a stream, natural order.
GRADDROP_EXPORT void graddrop_cpu_uniform16(uint64_t key, uint32_t draw, uint32_t domain, int64_t first, int64_t count,
                                            uint16_t* out) {
  struct Context {
    uint64_t key;
    uint32_t draw, domain;
    int64_t first, count;
    uint16_t* out;
  } context = {key, draw, domain, first, count, out};
  run((count + kUnit - 1) / kUnit, kGrainUnits,
      [](int64_t begin, int64_t end, void* pointer) {
        const Context& c = *static_cast<Context*>(pointer);
        const int64_t start = begin * kUnit, stop = std::min(end * kUnit, c.count);
        chosen->uniform16(c.key, c.draw, c.domain, c.first + start, stop - start, c.out + start);
      },
      &context);
}

// Bit-planes of a row's buckets: num_planes arrays of ceil(numel / 32) words.
GRADDROP_EXPORT void graddrop_cpu_bucket_planes(const TensorRow* row, int64_t buckets, int64_t num_planes,
                                                uint32_t* planes) {
  struct Context {
    const TensorRow* row;
    int64_t buckets, num_planes;
    uint32_t* planes;
  } context = {row, buckets, num_planes, planes};
  run((row->numel + kUnit - 1) / kUnit, kGrainUnits,
      [](int64_t begin, int64_t end, void* pointer) {
        const Context& c = *static_cast<Context*>(pointer);
        chosen->bucket_planes(*c.row, static_cast<uint32_t>(c.buckets), static_cast<int>(c.num_planes), begin * kUnit,
                              std::min(end * kUnit, c.row->numel), c.planes);
      },
      &context);
}

// The mask of a row's next step. Its elements lie in memory as [b, a] for each matrix [a, b] of their indices. Makes
// the bits of a mask, or the bit-planes of its buckets, in the order of memory. `planes` is 0 before.
GRADDROP_EXPORT void graddrop_cpu_memory_order_planes(const TensorRow* row, const HyperRow* hyper, int64_t a, int64_t b,
                                                      int64_t num_planes, uint32_t* planes) {
  struct Context {
    PreparedRow row;
    int64_t a, b, num_planes;
    uint32_t* planes;
  } context = {prepare(*row, *hyper, static_cast<int64_t>(*row->step), {}), a, b, num_planes, planes};
  const int64_t rows = tile_rows(b), tiles = row->numel / (a * b) * ((a + rows - 1) / rows);
  run(tiles, std::max<int64_t>(kGrainUnits * kUnit / (rows * b), 1),
      [](int64_t begin, int64_t end, void* pointer) {
        const Context& c = *static_cast<Context*>(pointer);
        chosen->memory_order_planes(c.row, c.a, c.b, static_cast<int>(c.num_planes), begin, end, c.planes);
      },
      &context);
}

// One Philox call per row, from counters and keys as given. For tests against other implementations.
GRADDROP_EXPORT void graddrop_cpu_philox(const uint32_t* counters, const uint64_t* keys, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords words =
        philox4x32_10(counters[4 * i], counters[4 * i + 1], counters[4 * i + 2], counters[4 * i + 3], keys[i]);
    std::memcpy(out + 4 * i, words.word, sizeof words.word);
  }
}
