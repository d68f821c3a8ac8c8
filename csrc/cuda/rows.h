// The row kernels on a device, on raw pointers: no torch. Launches on a stream and returns the first error; nothing
// waits for the device, and nothing is allocated. Pointers are the device's.
#pragma once
#include <cuda_runtime.h>

#include "core/rows.h"

namespace synkern {

struct DeviceRows {
  Rows rows;                       // class_weight_sum is not used:
  const double* class_weight_sum;  // it is on the device; null where there is none to take
};

// A sum over rows is taken by at most this many blocks, each of which leaves one partial sum.
constexpr int most_partials = 32;

// What the mean divides by: the sum of `count` partial sums of kept weights; 1 where count is 0.
struct Denominator {
  const double* partials;
  int count;
};

// loss[i] = weight_i F_i and the statistics; with `gradient`, also gradient[i, :] = weight_i dF_i/dlogits / denominator
// and, where not null, grad_weight[i] = F_i / denominator. The logits are read from memory once where a row fits on
// chip.
struct ForwardOutputs {
  void *losses, *gradient, *grad_weight;
  Denominator denominator;
  // Where one block takes all rows it also takes the denominator (`mean`) and, where `loss` is not null, the sum.
  bool alone, mean;
  void* loss;
};

// gradient[i, :] = scale_i weight_i dF_i/dlogits, grad_weight[i] = scale_i F_i where not null; scale_i = row_grad[i], or
// grad[0] / denominator_i where row_grad is null.
struct BackwardOutputs {
  const void *row_grad, *grad;
  bool unless_one;  // does nothing where grad[0] is 1
  void *gradient, *grad_weight;
};

// directional[i] = coefficient_i <dF_i/dlogits, v_i>; coefficient may be null (1)
struct TangentOutputs {
  const void* v;
  int64_t v_stride;
  const void* coefficient;
  void* directional;
};

// out[i, :] = coefficient_i (d2F_i/dlogits2) v_i + extra_i dF_i/dlogits, directional[i] = <dF_i/dlogits, v_i>; extra may
// be null (0)
struct HvpOutputs {
  const void* v;
  int64_t v_stride;
  const void *coefficient, *extra;
  void *out, *directional;
};

// One table an element type.
struct RowLaunchers {
  // Whether one block takes all rows, so that one launch does everything.
  bool (*alone)(const Rows&);
  cudaError_t (*forward)(const DeviceRows&, const ForwardOutputs&, cudaStream_t);
  cudaError_t (*backward)(const DeviceRows&, const BackwardOutputs&, cudaStream_t);
  cudaError_t (*tangent)(const DeviceRows&, const TangentOutputs&, cudaStream_t);
  cudaError_t (*hvp)(const DeviceRows&, const HvpOutputs&, cudaStream_t);
};
const RowLaunchers& row_launchers(DType dtype);

// Numbers of device memory that an operator's launches pass on to each other.
constexpr int64_t scratch_numbers = 2 * most_partials + 1;
// What needs them: class weights beside label smoothing, and a forward pass of more than one launch.
bool sums_class_weights(const Rows&);
bool takes_one_launch(const Rows&);

// Fills in class_weight_sum where the loss asks for it.
cudaError_t take_class_weights(DeviceRows&, double* scratch, cudaStream_t);

// Losses and statistics, and what else is not null: gradient and grad_weight of the reduced loss, and the reduced loss.
// One launch where one block takes all rows or nothing is reduced; else one more before it for the mean's denominator,
// and one, or two for more than 16384 rows, after it for the sum.
struct ForwardRequest {
  Reduction reduction;
  void *losses, *gradient, *grad_weight, *loss;
  double* scratch;
};
cudaError_t run_forward(const DeviceRows&, const ForwardRequest&, cudaStream_t);

// gradient and grad_weight, made for a cotangent of 1, are afterwards for grad[0]: scaled where they are float32, made
// again otherwise, since a 16-bit gradient scaled would be rounded twice and may have underflown. Nothing where it is 1.
cudaError_t run_rescale(const DeviceRows&, const void* grad, void* gradient, void* grad_weight, cudaStream_t);

}  // namespace synkern
