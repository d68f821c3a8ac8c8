// The LSTM's kernels. Compiled once per instruction set, as rows.cpp is.
#include "core/lstm.h"

#include "core/isa.h"
#include "core/tiles.h"

namespace synkern {
namespace {

constexpr int64_t gates_per_unit = 4;
// Samples that go through the steps together: W_hh is read once a step for all of them.
constexpr int64_t most_samples = 4 * tile_rows;

// 1 / (1 + e^-x) and tanh from exponentials of what is not positive, so that nothing overflows. NaN stays NaN.
template <typename A>
inline A sigmoid(A x) {
  const A e = exp_nonpositive(x < 0 ? x : -x), positive = A(1) / (A(1) + e), y = x < 0 ? e * positive : positive;
  return x == x ? y : x;
}

// Near zero 1 - e^-2x loses digits; there a quotient of polynomials (the continued fraction of tanh) has an error of 1e-8.
inline float hyperbolic_tangent(float x) {
  const float size = x < 0 ? -x : x, e = exp_nonpositive(-2 * size), far = (1 - e) / (1 + e);
  const float x2 = x * x;
  const float near = x * (135135.f + x2 * (17325.f + x2 * (378.f + x2))) /
                     (135135.f + x2 * (62370.f + x2 * (3150.f + x2 * 28.f)));
  const float y = size < 0.75f ? near : (x < 0 ? -far : far);
  return x == x ? y : x;
}
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// to[s * to_stride + column] = start + sum over k of from[s * from_stride + k] packed[k][column], for `samples` samples
template <typename A>
void multiply(const A* from, int64_t from_stride, const A* packed, int64_t inputs, int64_t outputs, const A* start,
              A* to, int64_t to_stride, int64_t samples, A* scratch) {
  pack_inputs([&](int64_t i) { return from + i * from_stride; }, samples, inputs, scratch);
  for (int64_t column = 0; column < outputs; column += tile_columns<A>) {
    for (int64_t s = 0; s < samples; s += tile_rows) {
      const int64_t rows = smaller(tile_rows, samples - s);
      Tile<A> tile;
      for (int64_t i = 0; start && i < rows; ++i)
        tile.start_row(i, start + (s + i) * to_stride + column, outputs - column);
      tile.add_products(scratch + s * inputs, packed + column * inputs, inputs);
      for (int64_t i = 0; i < rows; ++i) tile.store_row(i, to + (s + i) * to_stride + column, outputs - column);
    }
  }
}

// c' = f c + i g, h = o tanh(c')
template <typename A>
void step_forward(A* __restrict gates, const A* __restrict cell, A* __restrict next_cell, A* __restrict state,
                  int64_t units) {
  A *i = gates, *f = gates + units, *g = gates + 2 * units, *o = gates + 3 * units;
#pragma omp simd
  for (int64_t j = 0; j < units; ++j) {
    const A input = sigmoid(i[j]), forget = sigmoid(f[j]), candidate = hyperbolic_tangent(g[j]), out = sigmoid(o[j]);
    const A c = forget * cell[j] + input * candidate;
    i[j] = input;
    f[j] = forget;
    g[j] = candidate;
    o[j] = out;
    next_cell[j] = c;
    state[j] = out * hyperbolic_tangent(c);
  }
}

// dc += dh o (1 - tanh(c')^2); at the inputs of i, f, g, o: dc g i (1 - i), dc c f (1 - f), dc i (1 - g^2),
// dh tanh(c') o (1 - o); then dc f goes to the step before.
template <typename A>
void step_backward(const A* __restrict gates, const A* __restrict cell, const A* __restrict next_cell,
                   const A* __restrict dh, A* __restrict dc, A* __restrict grad, int64_t units) {
  const A *i = gates, *f = gates + units, *g = gates + 2 * units, *o = gates + 3 * units;
#pragma omp simd
  for (int64_t j = 0; j < units; ++j) {
    const A squashed = hyperbolic_tangent(next_cell[j]);
    const A d = dc[j] + dh[j] * o[j] * (A(1) - squashed * squashed);
    grad[j] = d * g[j] * i[j] * (A(1) - i[j]);
    grad[units + j] = d * cell[j] * f[j] * (A(1) - f[j]);
    grad[2 * units + j] = d * i[j] * (A(1) - g[j] * g[j]);
    grad[3 * units + j] = dh[j] * squashed * o[j] * (A(1) - o[j]);
    dc[j] = d * f[j];
  }
}

template <typename A>
void add(const A* from, A* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <typename A>
void forward_samples(const LSTMLayer& layer, const LSTMForward& arrays, int64_t begin, int64_t samples, A* scratch) {
  const int64_t steps = layer.steps, units = layer.units, width = gates_per_unit * units;
  const A* projection = static_cast<const A*>(arrays.projection) + begin * steps * width;
  A* gates = static_cast<A*>(arrays.gates) + begin * steps * width;
  A* cells = static_cast<A*>(arrays.cells) + begin * (steps + 1) * units;
  A* states = static_cast<A*>(arrays.states) + begin * steps * units;
  for (int64_t t = 0; t < steps; ++t) {
    const A* before = t ? states + (t - 1) * units : static_cast<const A*>(arrays.first) + begin * units;
    multiply(before, t ? steps * units : units, static_cast<const A*>(layer.weight), units, width,
             projection + t * width, gates + t * width, steps * width, samples, scratch);
    for (int64_t s = 0; s < samples; ++s) {
      A* cell = cells + (s * (steps + 1) + t) * units;
      step_forward(gates + (s * steps + t) * width, cell, cell + units, states + (s * steps + t) * units, units);
    }
  }
}

template <typename A>
void backward_samples(const LSTMLayer& layer, const LSTMBackward& arrays, int64_t begin, int64_t samples, A* scratch) {
  const int64_t steps = layer.steps, units = layer.units, width = gates_per_unit * units;
  const A* gates = static_cast<const A*>(arrays.gates) + begin * steps * width;
  const A* cells = static_cast<const A*>(arrays.cells) + begin * (steps + 1) * units;
  const auto outside = [&](const void* grad, int64_t s, int64_t t) {
    return static_cast<const A*>(grad) + ((begin + s) * steps + t) * units;
  };
  A* grad = static_cast<A*>(arrays.grad_gates) + begin * steps * width;
  A* dh = static_cast<A*>(arrays.grad_first) + begin * units;
  A* dc = static_cast<A*>(arrays.grad_first_cell) + begin * units;
  for (int64_t j = 0; j < samples * units; ++j) dh[j] = dc[j] = 0;
  for (int64_t t = steps - 1; t >= 0; --t) {
    for (int64_t s = 0; s < samples; ++s) {
      if (arrays.grad_states) add(outside(arrays.grad_states, s, t), dh + s * units, units);
      if (arrays.grad_cells) add(outside(arrays.grad_cells, s, t), dc + s * units, units);
      const A* cell = cells + (s * (steps + 1) + t) * units;
      step_backward(gates + (s * steps + t) * width, cell, cell + units, dh + s * units, dc + s * units,
                    grad + (s * steps + t) * width, units);
    }
    multiply(grad + t * width, steps * width, static_cast<const A*>(layer.weight), width, units,
             static_cast<const A*>(nullptr), dh, units, samples, scratch);
  }
}

template <typename A>
void forward(const LSTMLayer& layer, const LSTMForward& arrays, int64_t begin, int64_t end) {
  const Buffer<A> scratch = buffer<A>(most_samples * layer.units);
  for (int64_t s = begin; s < end; s += most_samples)
    forward_samples(layer, arrays, s, smaller(most_samples, end - s), scratch.get());
}

template <typename A>
void backward(const LSTMLayer& layer, const LSTMBackward& arrays, int64_t begin, int64_t end) {
  const Buffer<A> scratch = buffer<A>(most_samples * gates_per_unit * layer.units);
  for (int64_t s = begin; s < end; s += most_samples)
    backward_samples(layer, arrays, s, smaller(most_samples, end - s), scratch.get());
}

template <typename A>
void pack(const void* weight, int64_t units, void* packed) {
  pack_panels(static_cast<const A*>(weight), units, gates_per_unit * units, units, static_cast<A*>(packed));
}

template <typename A>
void pack_transposed(const void* weight, int64_t units, void* packed) {
  pack_panels_transposed(static_cast<const A*>(weight), units, gates_per_unit * units, static_cast<A*>(packed));
}

int64_t packed_size(int64_t units) {
  const int64_t forwards = panels_size<float>(gates_per_unit * units, units);
  const int64_t backwards = panels_size<float>(units, gates_per_unit * units);
  return forwards > backwards ? forwards : backwards;
}

#define SYNKERN_WIDE(dtype, function, ...) \
  return dtype == DType::float64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__);

void pack_any(DType dtype, const void* weight, int64_t units, void* packed) {
  SYNKERN_WIDE(dtype, pack, weight, units, packed)
}
void pack_transposed_any(DType dtype, const void* weight, int64_t units, void* packed) {
  SYNKERN_WIDE(dtype, pack_transposed, weight, units, packed)
}
void forward_any(const LSTMLayer& layer, const LSTMForward& arrays, int64_t b, int64_t e) {
  SYNKERN_WIDE(layer.dtype, forward, layer, arrays, b, e)
}
void backward_any(const LSTMLayer& layer, const LSTMBackward& arrays, int64_t b, int64_t e) {
  SYNKERN_WIDE(layer.dtype, backward, layer, arrays, b, e)
}

}  // namespace

extern const LSTMKernels SYNKERN_CONCAT(lstm_kernels_, SYNKERN_ISA);
const LSTMKernels SYNKERN_CONCAT(lstm_kernels_, SYNKERN_ISA) = {packed_size, pack_any, pack_transposed_any,
                                                               forward_any, backward_any};

}  // namespace synkern
