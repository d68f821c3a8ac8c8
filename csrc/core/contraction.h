// The per-sample meta-gradient of one layer: sum over a sample's rows of <b, J v>, on raw pointers. b is the gradient at
// the layer's output and J v the output's change along the direction v of its parameters, which is never stored.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace synkern {

// y = W a + bias, direction (v, v_bias)
struct LinearContraction {
  DType dtype;          // of a and b
  const void* a;        // (rows, inputs)
  const void* b;        // (rows, outputs)
  const void* packed;   // v, from `pack`
  const void* v_bias;   // (outputs,) in the accumulation type; may be null
  int64_t a_stride, b_stride, inputs, outputs;
};

// y = W[index], direction v
struct EmbeddingContraction {
  DType dtype;           // of b and v
  const int64_t* index;  // (rows,)
  const void* b;         // (rows, width)
  const void* v;         // (entries, width)
  int64_t b_stride, v_stride, width;
};

// y = weight (x - mean) rstd + bias, direction (v_weight, v_bias)
struct NormContraction {
  DType dtype;           // of x and b
  const void* x;         // (rows, width)
  const void* b;         // (rows, width)
  const void* mean;      // (rows,) in the accumulation type; null for RMSNorm
  const void* rstd;      // (rows,) in the accumulation type
  const void* v_weight;  // (width,) in the accumulation type; may be null
  const void* v_bias;    // (width,) in the accumulation type; may be null
  int64_t x_stride, b_stride, width;
};

// Results are one number a row, in double; the caller sums them by sample, in row order.
struct ContractionKernels {
  // Elements of the packed form of v (outputs, inputs), in the accumulation type.
  int64_t (*packed_size)(int64_t outputs, int64_t inputs);
  void (*pack)(DType dtype, const void* v, int64_t v_stride, int64_t outputs, int64_t inputs, void* packed);
  void (*linear)(const LinearContraction&, double* out, int64_t begin, int64_t end);
  void (*embedding)(const EmbeddingContraction&, double* out, int64_t begin, int64_t end);
  void (*norm)(const NormContraction&, double* out, int64_t begin, int64_t end);
};

// The kernels for this processor, chosen as row_kernels() is.
const ContractionKernels& contraction_kernels();

}  // namespace synkern
