// One LSTM layer in one direction, over sequences of one length, on raw pointers: forward, and a backward that gives the
// gradients at the gates' inputs, of which every parameter's gradient and every sample's score are matrix products.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace synkern {

// All arrays hold double where dtype is float64, float where it is float32. Gates lie in the order i, f, g, o.
struct LSTMLayer {
  DType dtype;
  int64_t samples, steps, units;
  const void* weight;  // W_hh (4 units, units), from `pack` for forward or `pack_transposed` for backward
};

struct LSTMForward {
  const void* projection;  // (samples, steps, 4 units): W_ih x + b_ih + b_hh
  const void* first;       // (samples, units) state before the first step
  void* gates;             // (samples, steps, 4 units), after their sigmoid or tanh
  void* cells;             // (samples, steps + 1, units), the first given
  void* states;            // (samples, steps, units)
};

struct LSTMBackward {
  const void* gates;
  const void* cells;
  const void* grad_states;  // (samples, steps, units); may be null
  const void* grad_cells;   // (samples, steps, units), from outside; may be null
  void* grad_gates;         // (samples, steps, 4 units): gradients at W_ih x + W_hh h + b
  void* grad_first;         // (samples, units)
  void* grad_first_cell;    // (samples, units)
};

// Samples [begin, end): they do not depend on each other, so that threads need not meet at every step.
struct LSTMKernels {
  int64_t (*packed_size)(int64_t units);
  void (*pack)(DType dtype, const void* weight, int64_t units, void* packed);
  void (*pack_transposed)(DType dtype, const void* weight, int64_t units, void* packed);
  void (*forward)(const LSTMLayer&, const LSTMForward&, int64_t begin, int64_t end);
  void (*backward)(const LSTMLayer&, const LSTMBackward&, int64_t begin, int64_t end);
};

// The kernels for this processor, chosen as row_kernels() is.
const LSTMKernels& lstm_kernels();

}  // namespace synkern
