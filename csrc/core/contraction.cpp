// The contraction kernels. Compiled once per instruction set, as rows.cpp is.
#include "core/contraction.h"

#include <cstdlib>
#include <memory>

#include "core/isa.h"
#include "core/vector_loops.h"

namespace synkern {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes), aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes), aligned(8)));
};

// A tile of tile_rows x tile_columns products J v stays in registers: 12 accumulators hide the latency of the
// multiply-add, 2 vectors of v and a broadcast of a fill AVX2's 16.
constexpr int64_t tile_rows = 6, tile_vectors = 2;
// block_rows x block_inputs of a fit the second-level cache, tile_columns x block_inputs of v the first. 96 KB also stays
// below what malloc maps anew at every call.
constexpr int64_t block_rows = 96, block_inputs = 256;

template <typename A>
constexpr int64_t lanes = vector_bytes / int64_t(sizeof(A));
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

// packed[tile][k][row] = a[tile * tile_rows + row][k], zero beyond the last row
template <typename T>
void pack_inputs(const T* a, int64_t stride, int64_t rows, int64_t inputs, acc_t<T>* packed) {
  using A = acc_t<T>;
  for (int64_t row = 0; row < ceil_div(rows, tile_rows) * tile_rows; ++row) {
    A* to = packed + row / tile_rows * tile_rows * inputs + row % tile_rows;
    const T* from = a + row * stride;
    for (int64_t k = 0; k < inputs; ++k) to[k * tile_rows] = row < rows ? load(from[k]) : A(0);
  }
}

template <typename A>
struct Tile {
  using V = typename Vector<A>::type;
  V sum[tile_rows][tile_vectors];

  explicit Tile(const A* start) {
    for (int64_t row = 0; row < tile_rows; ++row)
      for (int64_t j = 0; j < tile_vectors; ++j)
        sum[row][j] = start ? *reinterpret_cast<const V*>(start + j * lanes<A>) : V{};
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

// n elements of a row of b in the accumulation type, padded with zeros to a tile's width
template <typename T>
const acc_t<T>* load_tile_row(const T* b, int64_t n, acc_t<T>* scratch) {
  using A = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (n == tile_columns<A>) return b;
  }
  for (int64_t j = 0; j < tile_columns<A>; ++j) scratch[j] = j < n ? load(b[j]) : A(0);
  return scratch;
}

// Up to block_rows rows of a and b.
template <typename T>
class LinearBlock {
 public:
  using A = acc_t<T>;
  using V = typename Vector<A>::type;

  explicit LinearBlock(const LinearContraction& layer)
      : layer_(layer), a_(static_cast<A*>(std::malloc(size_t(block_rows * block_inputs) * sizeof(A)))) {
    const int64_t columns = ceil_div(layer.outputs, tile_columns<A>) * tile_columns<A>;
    if (!layer.v_bias) return;
    bias_.reset(static_cast<A*>(std::calloc(size_t(columns), sizeof(A))));
    std::memcpy(bias_.get(), layer.v_bias, size_t(layer.outputs) * sizeof(A));
  }

  void run(int64_t first, int64_t rows, double* out) {
    for (int64_t row = 0; row < rows; ++row) out[row] = 0;
    for (int64_t k = 0; k < layer_.inputs; k += block_inputs) {
      const int64_t inputs = smaller(block_inputs, layer_.inputs - k);
      pack_inputs(static_cast<const T*>(layer_.a) + first * layer_.a_stride + k, layer_.a_stride, rows, inputs,
                  a_.get());
      add_block(first, rows, k, inputs);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t lane = 0; lane < lanes<A>; ++lane) out[row] += double(sums_[row][lane]);
    }
  }

 private:
  // sums[row] = the part of <b, J v> from inputs [k, k + inputs), still spread over a vector's lanes
  void add_block(int64_t first, int64_t rows, int64_t k, int64_t inputs) {
    for (int64_t row = 0; row < ceil_div(rows, tile_rows) * tile_rows; ++row) sums_[row] = V{};
    for (int64_t column = 0; column < layer_.outputs; column += tile_columns<A>) {
      const A* v = static_cast<const A*>(layer_.packed) + column * layer_.inputs + k * tile_columns<A>;
      for (int64_t row = 0; row < rows; row += tile_rows) {
        Tile<A> tile(k == 0 && bias_ ? bias_.get() + column : nullptr);
        tile.add_products(a_.get() + row * inputs, v, inputs);
        for (int64_t i = 0; i < smaller(tile_rows, rows - row); ++i) multiply(tile, i, first + row, row + i, column);
      }
    }
  }

  void multiply(const Tile<A>& tile, int64_t i, int64_t tile_row, int64_t row, int64_t column) {
    A scratch[tile_columns<A>];
    const T* b = static_cast<const T*>(layer_.b) + (tile_row + i) * layer_.b_stride + column;
    const A* values = load_tile_row(b, smaller(tile_columns<A>, layer_.outputs - column), scratch);
    sums_[row] += tile.sum[i][0] * *reinterpret_cast<const V*>(values) +
                  tile.sum[i][1] * *reinterpret_cast<const V*>(values + lanes<A>);
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const LinearContraction& layer_;
  std::unique_ptr<A, Free> a_, bias_;
  V sums_[block_rows];
};

template <typename T>
void linear(const LinearContraction& layer, double* out, int64_t begin, int64_t end) {
  LinearBlock<T> block(layer);
  for (int64_t row = begin; row < end; row += block_rows) block.run(row, smaller(block_rows, end - row), out + row);
}

template <typename T>
double dot(const T* x, const T* y, int64_t n) {
  using A = acc_t<T>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += load(x[j]) * load(y[j]);
  return sum;
}

template <typename T>
void embedding(const EmbeddingContraction& layer, double* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    out[row] = dot(static_cast<const T*>(layer.b) + row * layer.b_stride,
                   static_cast<const T*>(layer.v) + layer.index[row] * layer.v_stride, layer.width);
}

template <typename T>
double norm_row(const T* x, const T* b, int64_t n, acc_t<T> mean, acc_t<T> rstd, const acc_t<T>* v_weight,
                const acc_t<T>* v_bias) {
  using A = acc_t<T>;
  A scaled = 0, shifted = 0;
  if (v_weight) {
#pragma omp simd reduction(+ : scaled)
    for (int64_t j = 0; j < n; ++j) scaled += load(b[j]) * v_weight[j] * (load(x[j]) - mean);
  }
  if (v_bias) {
#pragma omp simd reduction(+ : shifted)
    for (int64_t j = 0; j < n; ++j) shifted += load(b[j]) * v_bias[j];
  }
  return double(scaled) * double(rstd) + double(shifted);
}

template <typename T>
void norm(const NormContraction& layer, double* out, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A *mean = static_cast<const A*>(layer.mean), *rstd = static_cast<const A*>(layer.rstd);
  for (int64_t row = begin; row < end; ++row)
    out[row] = norm_row(static_cast<const T*>(layer.x) + row * layer.x_stride,
                        static_cast<const T*>(layer.b) + row * layer.b_stride, layer.width, mean ? mean[row] : A(0),
                        rstd[row], static_cast<const A*>(layer.v_weight), static_cast<const A*>(layer.v_bias));
}

template <typename T>
void pack(const void* v, int64_t stride, int64_t outputs, int64_t inputs, void* packed) {
  pack_panels(static_cast<const T*>(v), stride, outputs, inputs, static_cast<acc_t<T>*>(packed));
}

int64_t packed_size(int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, tile_columns<float>) * tile_columns<float> * inputs;
}
void pack_any(DType dtype, const void* v, int64_t stride, int64_t outputs, int64_t inputs, void* packed) {
  SYNKERN_BY_DTYPE(dtype, pack, v, stride, outputs, inputs, packed)
}
void linear_any(const LinearContraction& layer, double* out, int64_t b, int64_t e) {
  SYNKERN_BY_DTYPE(layer.dtype, linear, layer, out, b, e)
}
void embedding_any(const EmbeddingContraction& layer, double* out, int64_t b, int64_t e) {
  SYNKERN_BY_DTYPE(layer.dtype, embedding, layer, out, b, e)
}
void norm_any(const NormContraction& layer, double* out, int64_t b, int64_t e) {
  SYNKERN_BY_DTYPE(layer.dtype, norm, layer, out, b, e)
}

}  // namespace

extern const ContractionKernels SYNKERN_CONCAT(contraction_kernels_, SYNKERN_ISA);
const ContractionKernels SYNKERN_CONCAT(contraction_kernels_, SYNKERN_ISA) = {packed_size, pack_any, linear_any,
                                                                             embedding_any, norm_any};

}  // namespace synkern
