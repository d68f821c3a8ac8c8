// The contraction kernels. Compiled once per instruction set, as rows.cpp is.
#include "core/contraction.h"

#include "core/isa.h"
#include "core/tiles.h"

namespace synkern {
namespace {

// block_rows x block_inputs of a fit the second-level cache, tile_columns x block_inputs of v the first. 96 KB also stays
// below what malloc maps anew at every call.
constexpr int64_t block_rows = 96, block_inputs = 256;

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

template <typename T>
bool any_nonzero(const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (load(x[j]) != 0) return true;
  return false;
}

// Up to block_rows rows of a and b, in any places. Rows where b is zero are left out: padding's have no gradient, nor in
// the last layer of a model that classifies by one token have the others'. An infinite a there adds nothing.
template <typename T>
class LinearBlock {
 public:
  using A = acc_t<T>;
  using V = typename Vector<A>::type;

  explicit LinearBlock(const LinearContraction& layer)
      : layer_(layer), a_(buffer<A>(block_rows * block_inputs)) {}

  void run(double* out, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out[row] = 0;
      if (any_nonzero(b(row), layer_.outputs)) rows_[count_++] = row;
      if (count_ == block_rows) add_rows(out);
    }
    add_rows(out);
  }

 private:
  const T* b(int64_t row) const { return static_cast<const T*>(layer_.b) + row * layer_.b_stride; }

  void add_rows(double* out) {
    for (int64_t k = 0; k < layer_.inputs; k += block_inputs) {
      const int64_t inputs = smaller(block_inputs, layer_.inputs - k);
      const T* a = static_cast<const T*>(layer_.a) + k;
      pack_inputs([&](int64_t i) { return a + rows_[i] * layer_.a_stride; }, count_, inputs, a_.get());
      add_block(k, inputs);
      for (int64_t i = 0; i < count_; ++i)
        for (int64_t lane = 0; lane < lanes<A>; ++lane) out[rows_[i]] += double(sums_[i][lane]);
    }
    count_ = 0;
  }

  // sums[i] = the part of <b, J v> from inputs [k, k + inputs), still spread over a vector's lanes
  void add_block(int64_t k, int64_t inputs) {
    for (int64_t i = 0; i < ceil_div(count_, tile_rows) * tile_rows; ++i) sums_[i] = V{};
    for (int64_t column = 0; column < layer_.outputs; column += tile_columns<A>) {
      const A* v = static_cast<const A*>(layer_.packed) + column * layer_.inputs + k * tile_columns<A>;
      for (int64_t first = 0; first < count_; first += tile_rows) {
        Tile<A> tile;
        if (k == 0 && layer_.v_bias) start_with_bias(tile, column);
        tile.add_products(a_.get() + first * inputs, v, inputs);
        for (int64_t i = 0; i < smaller(tile_rows, count_ - first); ++i) multiply(tile, i, first + i, column);
      }
    }
  }

  void start_with_bias(Tile<A>& tile, int64_t column) const {
    const A* bias = static_cast<const A*>(layer_.v_bias) + column;
    for (int64_t row = 0; row < tile_rows; ++row) tile.start_row(row, bias, layer_.outputs - column);
  }

  void multiply(const Tile<A>& tile, int64_t tile_row, int64_t i, int64_t column) {
    A scratch[tile_columns<A>];
    const A* values =
        load_tile_row(b(rows_[i]) + column, smaller(tile_columns<A>, layer_.outputs - column), scratch);
    sums_[i] += tile.sum[tile_row][0] * *reinterpret_cast<const V*>(values) +
                tile.sum[tile_row][1] * *reinterpret_cast<const V*>(values + lanes<A>);
  }

  const LinearContraction& layer_;
  Buffer<A> a_;
  int64_t rows_[block_rows], count_ = 0;
  V sums_[block_rows];
};

template <typename T>
void linear(const LinearContraction& layer, double* out, int64_t begin, int64_t end) {
  LinearBlock<T>(layer).run(out, begin, end);
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
  return panels_size<float>(outputs, inputs);  // a double's panels are narrower: never more
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
