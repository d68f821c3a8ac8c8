// What does not depend on the instruction set: choosing one, and the helpers over rows.
#include <cstdlib>
#include <cstring>

#include "core/contraction.h"
#include "core/lstm.h"
#include "core/rows.h"

namespace synkern {

extern const RowKernels row_kernels_baseline;
extern const ContractionKernels contraction_kernels_baseline;
extern const LSTMKernels lstm_kernels_baseline;
#if defined(SYNKERN_X86)
extern const RowKernels row_kernels_avx2, row_kernels_avx512;
extern const ContractionKernels contraction_kernels_avx2, contraction_kernels_avx512;
extern const LSTMKernels lstm_kernels_avx2, lstm_kernels_avx512;
#endif

namespace {

struct Kernels {
  const RowKernels& rows;
  const ContractionKernels& contraction;
  const LSTMKernels& lstm;
};

Kernels pick() {
  const char* asked = std::getenv("SYNKERN_ISA");
  const auto wanted = [&](const char* name) { return !asked || !std::strcmp(asked, name); };
#if defined(SYNKERN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted("avx512")) return {row_kernels_avx512, contraction_kernels_avx512, lstm_kernels_avx512};
  if (avx2 && wanted("avx2")) return {row_kernels_avx2, contraction_kernels_avx2, lstm_kernels_avx2};
#endif
  (void)wanted;
  return {row_kernels_baseline, contraction_kernels_baseline, lstm_kernels_baseline};
}

const Kernels& kernels() {
  static const Kernels picked = pick();
  return picked;
}

}  // namespace

const RowKernels& row_kernels() { return kernels().rows; }
const ContractionKernels& contraction_kernels() { return kernels().contraction; }
const LSTMKernels& lstm_kernels() { return kernels().lstm; }

int64_t first_bad_target(const Rows& rows) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t y = target_at(rows, i);
    if ((y < 0 || y >= rows.classes) && y != rows.ignore_index) return i;
  }
  return -1;
}

template <typename A>
static double kept_weight_of(const Rows& rows) {
  double sum = 0;
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t y = target_at(rows, i);
    if (y != rows.ignore_index) sum += rows.class_weight ? double(static_cast<const A*>(rows.class_weight)[y]) : 1.0;
  }
  return sum;
}

double kept_weight(const Rows& rows) {
  return rows.dtype == DType::float64 ? kept_weight_of<double>(rows) : kept_weight_of<float>(rows);
}

int64_t row_grain(int64_t classes) {
  constexpr int64_t elements_per_task = 16384;  // about 10 us of work, above the cost of waking a thread
  return 1 + elements_per_task / (classes + 16);
}

}  // namespace synkern
