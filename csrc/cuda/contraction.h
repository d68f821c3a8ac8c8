// The contractions of the meta-gradient on a device, on raw pointers: no torch. Launches on a stream and returns the
// first error; nothing waits for the device, nothing is allocated. Pointers are the device's.
#pragma once
#include <cuda_runtime.h>

#include "core/dtype.h"

namespace synkern {

// The sample of a row: index[row], or one of `samples` equal groups of neighbouring rows where index is null.
struct Samples {
  const int64_t* index;
  int64_t samples, rows;
};

// sum over rows of <b, V a + v_bias>. v has the type of a and b, or, beside 16-bit a and b, float32.
struct DeviceLinear {
  DType dtype, v_dtype;
  const void *a, *b, *v;
  const void* v_bias;  // (outputs,) in the accumulation type; may be null
  int64_t a_stride, b_stride, v_stride, inputs, outputs;
};

// sum over rows of <b, v[index]>; an index out of range makes its sample NaN
struct DeviceEmbedding {
  DType dtype;
  const int64_t* index;
  const void *b, *v;
  int64_t b_stride, v_stride, width, entries;
};

// sum over rows of <b, v_weight (x - mean) rstd + v_bias>; mean, v_weight and v_bias may be null
struct DeviceNorm {
  DType dtype;
  const void *x, *b;
  const void *mean, *rstd, *v_weight, *v_bias;  // in the accumulation type
  int64_t x_stride, b_stride, width;
};

// Numbers of scratch: every row leaves one for each tile of outputs.
int64_t partials_of(const DeviceLinear&, int64_t rows);

// out[n], in the accumulation type, is summed in a fixed order in double. A sample out of range makes everything NaN.
cudaError_t run_linear(const DeviceLinear&, const Samples&, double* partials, void* out, cudaStream_t);
// partials: one a row
cudaError_t run_embedding(const DeviceEmbedding&, const Samples&, double* partials, void* out, cudaStream_t);
cudaError_t run_norm(const DeviceNorm&, const Samples&, double* partials, void* out, cudaStream_t);

}  // namespace synkern
