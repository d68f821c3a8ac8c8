// Matrix products in tiles that stay in registers, compiled once per instruction set. In an unnamed namespace, as
// vectors.h is.
#pragma once
#include <cstdlib>
#include <memory>

#include "core/vectors.h"

namespace synkern {
namespace {

// A tile of tile_rows x tile_columns sums stays in registers: 12 accumulators hide the latency of the multiply-add, 2
// vectors of v and a broadcast of a fill AVX2's 16.
constexpr int64_t tile_rows = 6, tile_vectors = 2;
template <typename A>
constexpr int64_t tile_columns = tile_vectors * lanes<A>;

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// packed[panel][k][column] = v[panel * tile_columns + column][k], zero beyond the last output
template <typename T>
void pack_panels(const T* v, int64_t stride, int64_t outputs, int64_t inputs, acc_t<T>* packed) {
  using A = acc_t<T>;
  for (int64_t panel = 0; panel < ceil_div(outputs, tile_columns<A>); ++panel) {
    A* to = packed + panel * inputs * tile_columns<A>;
    for (int64_t column = 0; column < tile_columns<A>; ++column) {
      const int64_t output = panel * tile_columns<A> + column;
      const T* from = v + output * stride;
      for (int64_t k = 0; k < inputs; ++k) to[k * tile_columns<A> + column] = output < outputs ? load(from[k]) : A(0);
    }
  }
}

// packed[tile][k][row] = a[tile * tile_rows + row][k], zero beyond the last row; row_of(i) points to row i of a
template <typename A, typename F>
void pack_inputs(const F& row_of, int64_t rows, int64_t inputs, A* packed) {
  for (int64_t row = 0; row < ceil_div(rows, tile_rows) * tile_rows; ++row) {
    A* to = packed + row / tile_rows * tile_rows * inputs + row % tile_rows;
    const auto* from = row < rows ? row_of(row) : nullptr;
    for (int64_t k = 0; k < inputs; ++k) to[k * tile_rows] = from ? load(from[k]) : A(0);
  }
}

// The same panels of v's transpose, v (inputs, outputs)
template <typename A>
void pack_panels_transposed(const A* v, int64_t outputs, int64_t inputs, A* packed) {
  for (int64_t panel = 0; panel < ceil_div(outputs, tile_columns<A>); ++panel)
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t column = 0; column < tile_columns<A>; ++column) {
        const int64_t output = panel * tile_columns<A> + column;
        *packed++ = output < outputs ? v[k * outputs + output] : A(0);
      }
}

// Panels of either kind, in elements.
template <typename A>
int64_t panels_size(int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, tile_columns<A>) * tile_columns<A> * inputs;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename A>
using Buffer = std::unique_ptr<A, Free>;
template <typename A>
Buffer<A> buffer(int64_t size) {
  return Buffer<A>(static_cast<A*>(std::malloc(size_t(size) * sizeof(A))));
}

template <typename A>
struct Tile {
  using V = typename Vector<A>::type;
  V sum[tile_rows][tile_vectors] = {};

  // n columns, zero beyond them
  void start_row(int64_t row, const A* from, int64_t n) {
    A padded[tile_columns<A>];
    if (n < tile_columns<A>) {
      for (int64_t j = 0; j < tile_columns<A>; ++j) padded[j] = j < n ? from[j] : A(0);
      from = padded;
    }
    for (int64_t j = 0; j < tile_vectors; ++j) sum[row][j] = *reinterpret_cast<const V*>(from + j * lanes<A>);
  }

  void store_row(int64_t row, A* to, int64_t n) const {
    if (n >= tile_columns<A>) {
      for (int64_t j = 0; j < tile_vectors; ++j) *reinterpret_cast<V*>(to + j * lanes<A>) = sum[row][j];
      return;
    }
    A padded[tile_columns<A>];
    for (int64_t j = 0; j < tile_vectors; ++j) *reinterpret_cast<V*>(padded + j * lanes<A>) = sum[row][j];
    for (int64_t j = 0; j < n; ++j) to[j] = padded[j];
  }

  void add_products(const A* a, const A* v, int64_t inputs) {
    for (int64_t k = 0; k < inputs; ++k, a += tile_rows, v += tile_columns<A>) {
      const V v0 = *reinterpret_cast<const V*>(v), v1 = *reinterpret_cast<const V*>(v + lanes<A>);
#pragma GCC unroll 6
      for (int64_t row = 0; row < tile_rows; ++row) {
        sum[row][0] += a[row] * v0;
        sum[row][1] += a[row] * v1;
      }
    }
  }
};

}  // namespace
}  // namespace synkern
