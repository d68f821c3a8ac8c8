// CPU row kernels on raw pointers: no torch, no Python, no threads (the caller splits the rows).
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "losses/row_terms.h"

namespace synkern {

enum class IndexType : int { int64, int32, int16, uint8 };

// What the rows' losses become: numbers of the operator schema.
enum class Reduction : int64_t { none = 0, sum = 1, mean = 2 };

// What every kernel reads. `weight`, `ratio`, `class_weight`, `statistics` hold double where logits are float64,
// float otherwise; the first three may be null.
struct Rows {
  const void* logits;
  int64_t logits_stride;  // elements between rows; 0 for an expanded row
  DType dtype;
  const void* target;
  IndexType target_type;
  int64_t rows, classes;
  int64_t ignore_index;
  const void* weight;        // (rows,)
  const void* ratio;         // (rows,): quality / diversity (imp), quality (dimp), or its logarithm
  const void* class_weight;  // (classes,)
  double class_weight_sum;   // sum of class_weight, `classes` where it is null
  LossParameters loss;
  void* statistics;  // (statistics_rows, rows), written by forward, read by the others
};

// Rows of `statistics`. The sum leaves out one occurrence of the maximum: log1p of it keeps the digits of a
// confident row that log(1 + tiny) loses.
// Each row carries the denominator of the reduction it went into, so that backward works row by row.
enum Statistic {
  stat_max = 0,
  stat_rest = 1,
  stat_centered_logit = 2,
  stat_ratio = 3,
  stat_denominator = 4,
  statistics_rows = 5,
};

// Every function works on rows [begin, end). F_i is the loss of row i times its class weight, without `weight`.
struct RowKernels {
  const char* isa;
  // loss[i] = weight_i F_i; writes the statistics but the denominator. The targets must have been checked.
  void (*forward)(const Rows&, void* loss, int64_t begin, int64_t end);
  // gradient[i, :] = scale_i weight_i dF_i/dlogits; grad_weight[i] = scale_i F_i where not null.
  // scale_i = grad[i], or scale / denominator_i where grad is null.
  void (*backward)(const Rows&, const void* grad, double scale, void* gradient, void* grad_weight, int64_t begin,
                   int64_t end);
  // Both at once, for a loss that is summed and scaled: loss[i] = weight_i F_i, statistics, and
  // gradient[i, :] = scale weight_i dF_i/dlogits, grad_weight[i] = scale F_i. The logits are read from memory once.
  void (*forward_backward)(const Rows&, double scale, void* loss, void* gradient, void* grad_weight, int64_t begin,
                           int64_t end);
  // directional[i] = coefficient_i <dF_i/dlogits, v_i>; coefficient may be null (1).
  void (*tangent)(const Rows&, const void* v, int64_t v_stride, const void* coefficient, void* directional,
                  int64_t begin, int64_t end);
  // out[i, :] = coefficient_i (d2F_i/dlogits2) v_i + extra_i dF_i/dlogits; directional[i] = <dF_i/dlogits, v_i>.
  // extra may be null (0).
  void (*hvp)(const Rows&, const void* v, int64_t v_stride, const void* coefficient, const void* extra, void* out,
              void* directional, int64_t begin, int64_t end);
  // x[j] *= scale for j in [begin, end)
  void (*scale_float32)(void* x, double scale, int64_t begin, int64_t end);
  // out[i, j] = d2F_i/dlogits_j2: what gradient boosting takes for a Hessian.
  void (*hessian_diagonal)(const Rows&, void* out, int64_t begin, int64_t end);
};

// The kernels for this processor; SYNKERN_ISA=baseline|avx2|avx512 in the environment asks for one of them, and an
// answer other than the one asked for is visible in `isa`.
const RowKernels& row_kernels();

SYNKERN_INLINE int64_t target_at(const Rows& rows, int64_t row) {
  switch (rows.target_type) {
    case IndexType::int32:
      return static_cast<const int32_t*>(rows.target)[row];
    case IndexType::int16:
      return static_cast<const int16_t*>(rows.target)[row];
    case IndexType::uint8:
      return static_cast<const uint8_t*>(rows.target)[row];
    default:
      return static_cast<const int64_t*>(rows.target)[row];
  }
}
// values[i], of type A; `otherwise` where there are none
template <typename A>
SYNKERN_INLINE double at_or(const void* values, int64_t i, double otherwise) {
  return values ? double(static_cast<const A*>(values)[i]) : otherwise;
}
template <typename A>
SYNKERN_INLINE void save_statistics(const Rows& rows, int64_t row, const RowStatistics& s, double ratio) {
  A* statistics = static_cast<A*>(rows.statistics) + row;
  statistics[stat_max * rows.rows] = A(s.max);
  statistics[stat_rest * rows.rows] = A(s.rest);
  statistics[stat_centered_logit * rows.rows] = A(s.centered);
  statistics[stat_ratio * rows.rows] = A(ratio);
}
template <typename A>
SYNKERN_INLINE RowStatistics saved_statistics(const Rows& rows, int64_t row) {
  const A* statistics = static_cast<const A*>(rows.statistics) + row;
  return {double(statistics[stat_max * rows.rows]), double(statistics[stat_rest * rows.rows]),
          double(statistics[stat_centered_logit * rows.rows])};
}
// First row in [0, rows) whose target is neither in [0, classes) nor ignore_index; -1 if there is none.
int64_t first_bad_target(const Rows& rows);
// Sum over kept rows of class_weight[target] (1 where there are no class weights).
double kept_weight(const Rows& rows);
// Rows a thread should take at least, so that small problems stay on one.
int64_t row_grain(int64_t classes);

}  // namespace synkern
