// The LSTM's operators: schemas, argument checks and CPU launchers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/lstm.h"
#include "torch/tensors.h"

namespace synkern {
namespace {

void check(const Tensor& x, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  bool fits = x.dim() == int64_t(shape.size()) && x.scalar_type() == type;
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = x.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, "synkern: ", name, " does not have the shape or dtype that fits the gates");
}

const void* optional_data(const MaybeTensor& given, MaybeTensor& kept, const char* name,
                          std::initializer_list<int64_t> shape, ScalarType type) {
  if (!given.has_value()) return nullptr;
  check(*given, name, shape, type);
  kept = as_contiguous(*given);
  return kept->const_data_ptr();
}

// Shape (samples, steps, 4 units) of projection or gates, and W_hh packed for one of the kernels.
struct Layer {
  LSTMLayer layer;
  ScalarType type;
  Tensor packed;

  Layer(const Tensor& gates, const char* name, const Tensor& w_hh, bool transposed)
      : type(gates.scalar_type()), packed(gates) {
    STD_TORCH_CHECK(gates.dim() == 3 && gates.size(2) % 4 == 0 && (type == ScalarType::Float || type == ScalarType::Double),
                    "synkern: ", name, " must be float32 or float64 of shape (N, T, 4 H)");
    layer = {dtype_of(gates, name), gates.size(0), gates.size(1), gates.size(2) / 4, nullptr};
    check(w_hh, "w_hh", {4 * layer.units, layer.units}, type);
    const LSTMKernels& kernels = lstm_kernels();
    const Tensor weight = as_contiguous(w_hh);
    packed = new_tensor(gates, {kernels.packed_size(layer.units)}, type);
    (transposed ? kernels.pack_transposed : kernels.pack)(layer.dtype, weight.const_data_ptr(), layer.units,
                                                          packed.mutable_data_ptr());
    layer.weight = packed.const_data_ptr();
  }

  Tensor empty(const Tensor& like, int64_t steps, int64_t width) const {
    return torch::stable::new_empty(like, {layer.samples, steps, width});
  }

  template <typename F>
  void for_samples(const F& f) const {
    constexpr int64_t work_per_task = 1 << 20;  // multiply-adds, some 20 us
    const int64_t work = 4 * layer.units * layer.units * layer.steps, grain = 1 + work_per_task / (work + 1);
    if (layer.samples <= grain)
      f(0, layer.samples);
    else
      torch::stable::parallel_for(0, layer.samples, grain, f);
  }
};

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& projection_, const Tensor& w_hh, const Tensor& first_,
                                        const Tensor& first_cell) {
  const Tensor projection = as_contiguous(projection_);
  const Layer layer(projection, "projection", w_hh, false);
  const int64_t steps = layer.layer.steps, units = layer.layer.units;
  check(first_, "first", {layer.layer.samples, units}, layer.type);
  check(first_cell, "first_cell", {layer.layer.samples, units}, layer.type);
  const Tensor first = as_contiguous(first_);
  Tensor gates = layer.empty(projection, steps, 4 * units), cells = layer.empty(projection, steps + 1, units),
         states = layer.empty(projection, steps, units);
  Tensor before = torch::stable::select(cells, 1, 0);
  torch::stable::copy_(before, first_cell);
  const LSTMForward arrays{projection.const_data_ptr(), first.const_data_ptr(), gates.mutable_data_ptr(),
                           cells.mutable_data_ptr(), states.mutable_data_ptr()};
  layer.for_samples([&](int64_t b, int64_t e) { lstm_kernels().forward(layer.layer, arrays, b, e); });
  return {gates, cells, states};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward(const Tensor& gates_, const Tensor& cells_, const Tensor& w_hh,
                                                 MaybeTensor grad_states, MaybeTensor grad_cells) {
  const Tensor gates = as_contiguous(gates_), cells = as_contiguous(cells_);
  const Layer layer(gates, "gates", w_hh, true);
  const int64_t samples = layer.layer.samples, steps = layer.layer.steps, units = layer.layer.units;
  check(cells, "cells", {samples, steps + 1, units}, layer.type);
  Tensor grad_gates = layer.empty(gates, steps, 4 * units);
  Tensor grad_first = new_tensor(gates, {samples, units}, layer.type),
         grad_first_cell = new_tensor(gates, {samples, units}, layer.type);
  MaybeTensor of_states, of_cells;
  const LSTMBackward arrays{gates.const_data_ptr(),
                            cells.const_data_ptr(),
                            optional_data(grad_states, of_states, "grad_states", {samples, steps, units}, layer.type),
                            optional_data(grad_cells, of_cells, "grad_cells", {samples, steps, units}, layer.type),
                            grad_gates.mutable_data_ptr(),
                            grad_first.mutable_data_ptr(),
                            grad_first_cell.mutable_data_ptr()};
  layer.for_samples([&](int64_t b, int64_t e) { lstm_kernels().backward(layer.layer, arrays, b, e); });
  return {grad_gates, grad_first, grad_first_cell};
}

}  // namespace
}  // namespace synkern

// Gates in the order i, f, g, o.
// lstm: projection (N, T, 4 H) = W_ih x + b_ih + b_hh, w_hh (4 H, H), first and first_cell (N, H)
//   -> gates (N, T, 4 H) after sigmoid or tanh, cells (N, T + 1, H) from the first on, states (N, T, H)
// lstm_backward: gradients at states and cells (N, T, H)
//   -> gradients at the gates' inputs (N, T, 4 H), of first and of first_cell (N, H)
STABLE_TORCH_LIBRARY_FRAGMENT(synkern, m) {
  m.def("lstm(Tensor projection, Tensor w_hh, Tensor first, Tensor first_cell) -> "
        "(Tensor gates, Tensor cells, Tensor states)");
  m.def("lstm_backward(Tensor gates, Tensor cells, Tensor w_hh, Tensor? grad_states, Tensor? grad_cells) -> "
        "(Tensor grad_gates, Tensor grad_first, Tensor grad_first_cell)");
}

STABLE_TORCH_LIBRARY_IMPL(synkern, CPU, m) {
  m.impl("lstm", TORCH_BOX(&synkern::lstm));
  m.impl("lstm_backward", TORCH_BOX(&synkern::lstm_backward));
}
