// The contraction kernels: a tile of V a is made in registers, multiplied with the tile of b where it stands, and leaves
// one number a row; nothing of size rows x outputs is stored.
#include "cuda/contraction.h"
#include "cuda/device.cuh"

namespace synkern {
namespace {

// ---- Sum by sample --------------------------------------------------------------------------------------------------

constexpr int sum_threads = 256;

__device__ __forceinline__ double sum_over_tiles(const double* partials, int64_t row, int64_t tiles) {
  double sum = 0;
  for (int64_t i = 0; i < tiles; ++i) sum += partials[row * tiles + i];
  return sum;
}

// A block a sample, each thread every 256th row.
template <typename A>
__global__ void __launch_bounds__(sum_threads)
    sum_by_sample(const double* partials, int64_t tiles, const Samples samples, A* out) {
  struct Slots {
    double sums[sum_threads / warp_lanes];
  };
  SYNKERN_SHARED(Slots, slots);
  const int64_t sample = blockIdx.x;
  double sum = 0;
  if (samples.index) {
    for (int64_t row = threadIdx.x; row < samples.rows; row += blockDim.x) {
      const int64_t its = samples.index[row];
      if (its < 0 || its >= samples.samples) sum = double(NAN);
      if (its == sample) sum += sum_over_tiles(partials, row, tiles);
    }
  } else {
    const int64_t size = samples.rows / samples.samples * tiles;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += partials[sample * size + i];
  }
  sum = sum_over_lanes(sum, warp_lanes);
  if (threadIdx.x % warp_lanes == 0) slots.sums[threadIdx.x / warp_lanes] = sum;
  sync_block();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < sum_threads / warp_lanes; ++i) sum += slots.sums[i];
  out[sample] = A(sum);
}

cudaError_t sum_rows(DType dtype, const double* partials, int64_t tiles, const Samples& samples, void* out,
                     Stream stream) {
  const Shape shape{samples.samples, sum_threads};
  if (dtype == DType::float64)
    return launch(sum_by_sample<double>, shape, stream, partials, tiles, samples, static_cast<double*>(out));
  return launch(sum_by_sample<float>, shape, stream, partials, tiles, samples, static_cast<float*>(out));
}

// ---- Linear layers --------------------------------------------------------------------------------------------------

constexpr int tile_threads = 256;

struct TileIndex {
  int64_t row, column;
};

// Tiles in the order of blocks: groups of 8 rows of tiles, column by column, so that what runs at once shares operands in
// the second-level cache.
__device__ __forceinline__ TileIndex tile_of(int64_t block, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t group_rows = 8;
  const int64_t group = block / (group_rows * column_tiles), within = block % (group_rows * column_tiles);
  const int64_t rows = smaller(group_rows, row_tiles - group * group_rows);
  return {group * group_rows + within % rows, within / rows};
}

// 16-bit operands on tensor cores. A block has 128 rows and 128 outputs, 8 warps of 64 x 32, and 4 slices of 32 inputs on
// their way at any time.
constexpr int mma_tile = 128, mma_inputs = 32, mma_stages = 4;
constexpr int mma_row_vectors = mma_inputs / 8;                     // 16-byte vectors of a row of a slice
constexpr int mma_slice_vectors = mma_tile * mma_row_vectors;       // of one operand
constexpr int mma_shared_bytes = mma_stages * 2 * mma_slice_vectors * 16;

// Where a vector of a slice lies: any 8 rows of one column, or of a matrix load, fall into different banks.
__device__ __forceinline__ int slice_at(int row, int vector) {
  return row * mma_row_vectors + (vector ^ ((row >> 1) & (mma_row_vectors - 1)));
}

// What a thread copies of every slice of an operand: two vectors, 64 rows apart, at the same inputs.
template <typename T>
struct MmaOperand {
  static constexpr int own = mma_slice_vectors / tile_threads;
  const T* rows[own];  // null where the operand has no such row
  bool aligned;        // every row starts at a multiple of 16 bytes

  __device__ __forceinline__ MmaOperand(const void* base_, int64_t stride, int64_t count, int64_t first_row) {
    const T* base = static_cast<const T*>(base_);
    aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int64_t row = first_row + int(threadIdx.x) / mma_row_vectors + i * (tile_threads / mma_row_vectors);
      rows[i] = row < count ? base + row * stride : nullptr;
    }
  }

  // Inputs [k, k + left) to the thread's places of the slice at `to`, and zeros where there are fewer than 8.
  __device__ __forceinline__ void copy(int64_t k, int left, uint4* to) const {
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const int n = rows[i] ? left : 0;
      const T* from = rows[i] + (n ? k : 0);
      uint4* place = to + i * tile_threads;
      if (aligned) {
        copy_async(place, from, n * int(sizeof(T)));
        continue;
      }
      uint32_t words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t low = 2 * word < n ? read_only(from + 2 * word).bits : 0;
        const uint32_t high = 2 * word + 1 < n ? read_only(from + 2 * word + 1).bits : 0;
        words[word] = low | high << 16;
      }
      *place = {words[0], words[1], words[2], words[3]};
    }
  }
};

template <typename T>
__device__ __forceinline__ void load_slice(const MmaOperand<T>& a, const MmaOperand<T>& v, int64_t inputs, int slice,
                                           uint4* stage) {
  const int row = int(threadIdx.x) / mma_row_vectors, vector = int(threadIdx.x) % mma_row_vectors;
  const int64_t k = int64_t(slice) * mma_inputs + vector * 8;
  const int left = k < inputs ? int(smaller(8, inputs - k)) : 0;
  a.copy(k, left, stage + slice_at(row, vector));
  v.copy(k, left, stage + mma_slice_vectors + slice_at(row, vector));
  copies_commit();
}

constexpr int warp_rows = 64, warp_columns = 32;  // of a warp's part of the tile
constexpr int row_steps = warp_rows / 16, column_steps = warp_columns / 8;

struct WarpTile {
  int row, column;  // first of the warp's in the block's tile
  float sums[row_steps][column_steps][4];
};

template <typename T>
__device__ __forceinline__ void multiply_slice(const uint4* stage, WarpTile& tile) {
  const int lane = int(threadIdx.x) % warp_lanes;
#pragma unroll
  for (int k = 0; k < mma_inputs; k += 16) {
    uint32_t a[row_steps][4], v[column_steps / 2][4];
#pragma unroll
    for (int i = 0; i < row_steps; ++i)
      load_matrices(a[i], stage + slice_at(tile.row + i * 16 + lane % 16, k / 8 + lane / 16));
#pragma unroll
    for (int j = 0; j < column_steps / 2; ++j)
      load_matrices(v[j], stage + mma_slice_vectors +
                              slice_at(tile.column + j * 16 + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < row_steps; ++i)
#pragma unroll
      for (int j = 0; j < column_steps; ++j)
        multiply_add<T>(tile.sums[i][j], a[i], v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]);
  }
}

struct RowSums {
  float of[mma_tile / warp_columns][mma_tile];  // by column of warps, by row
};

// The rows' products with b, summed over the tile's outputs.
template <typename T>
__device__ __forceinline__ void multiply_with_b(const DeviceLinear& layer, int64_t rows, const TileIndex& index,
                                                const WarpTile& tile, RowSums& sums) {
  const int lane = int(threadIdx.x) % warp_lanes;
  const float* bias = static_cast<const float*>(layer.v_bias);
#pragma unroll
  for (int i = 0; i < 2 * row_steps; ++i) {  // row steps, upper and lower half
    const int row_in_tile = tile.row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    const int64_t row = index.row * mma_tile + row_in_tile;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 2 * column_steps; ++j) {
      const int64_t column = index.column * mma_tile + tile.column + j / 2 * 8 + lane % 4 * 2 + j % 2;
      if (row >= rows || column >= layer.outputs) continue;
      const float change = tile.sums[i / 2][j / 2][i % 2 * 2 + j % 2] + (bias ? read_only(bias + column) : 0.f);
      sum += change * load(read_only(static_cast<const T*>(layer.b) + row * layer.b_stride + column));
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0) sums.of[tile.column / warp_columns][row_in_tile] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(tile_threads, 2)
    linear_mma(const DeviceLinear layer, int64_t rows, int64_t column_tiles, double* partials) {
  SYNKERN_SHARED(RowSums, sums);
  const TileIndex index = tile_of(blockIdx.x, ceil_div(rows, mma_tile), column_tiles);
  const MmaOperand<T> a(layer.a, layer.a_stride, rows, index.row * mma_tile),
      v(layer.v, layer.v_stride, layer.outputs, index.column * mma_tile);
  const int warp = int(threadIdx.x) / warp_lanes;
  WarpTile tile{warp / 4 * warp_rows, warp % 4 * warp_columns, {}};
  const int slices = int(ceil_div(layer.inputs, mma_inputs));
  uint4* shared = dynamic_shared();
  const auto stage_of = [&](int slice) { return shared + slice % mma_stages * (2 * mma_slice_vectors); };
#pragma unroll 1
  for (int slice = 0; slice < mma_stages - 1; ++slice) load_slice(a, v, layer.inputs, slice, stage_of(slice));
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    copies_wait<mma_stages - 2>();
    sync_block();  // the slice has arrived for all, and nobody reads the one before it any more
    const int next = slice + mma_stages - 1;
    load_slice(a, v, layer.inputs, next, stage_of(next));  // beyond the last input: zeros
    multiply_slice<T>(stage_of(slice), tile);
  }
  copies_done();
  multiply_with_b<T>(layer, rows, index, tile, sums);
  sync_block();
  const int64_t row = index.row * mma_tile + threadIdx.x;
  if (threadIdx.x >= mma_tile || row >= rows) return;
  double sum = 0;
  for (int i = 0; i < mma_tile / warp_columns; ++i) sum += double(sums.of[i][threadIdx.x]);
  partials[row * column_tiles + index.column] = sum;
}

// Everything else by multiply-adds in the accumulation type: 16 x 16 threads of `micro` x `micro` products.
template <typename A>
constexpr int micro = sizeof(A) == 8 ? 4 : 8;
template <typename A>
constexpr int fma_tile = 16 * micro<A>;
constexpr int fma_inputs = 8;

template <typename A>
struct FmaSlice {
  A a[fma_inputs][fma_tile<A> + 4], v[fma_inputs][fma_tile<A> + 4];
};

// A thread's elements of an operand's slice: neighbours in a row.
template <typename A>
constexpr int fma_own = fma_tile<A> * fma_inputs / tile_threads;

template <typename T, typename A>
__device__ __forceinline__ void load_own(const void* base, int64_t stride, int64_t rows, int64_t inputs, int64_t first,
                                         int64_t k, A (&x)[fma_own<A>]) {
  const int at = int(threadIdx.x) * fma_own<A>;
  const int64_t row = first + at / fma_inputs, start = k + at % fma_inputs;
#pragma unroll
  for (int i = 0; i < fma_own<A>; ++i)
    x[i] = row < rows && start + i < inputs ? A(load(read_only(static_cast<const T*>(base) + row * stride + start + i)))
                                            : A(0);
}

template <typename A>
__device__ __forceinline__ void store_own(const A (&x)[fma_own<A>], A (*slice)[fma_tile<A> + 4]) {
  const int at = int(threadIdx.x) * fma_own<A>;
#pragma unroll
  for (int i = 0; i < fma_own<A>; ++i) slice[at % fma_inputs + i][at / fma_inputs] = x[i];
}

template <typename T, typename V>
__global__ void __launch_bounds__(tile_threads)
    linear_fma(const DeviceLinear layer, int64_t rows, int64_t column_tiles, double* partials) {
  using A = acc_t<T>;
  SYNKERN_SHARED(FmaSlice<A>, slice);
  constexpr int n = micro<A>;
  const TileIndex index = tile_of(blockIdx.x, ceil_div(rows, fma_tile<A>), column_tiles);
  const int64_t first_row = index.row * fma_tile<A>, first_column = index.column * fma_tile<A>;
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  A sums[n][n] = {}, own_a[fma_own<A>], own_v[fma_own<A>];
  const auto load_slice = [&](int64_t k) {
    load_own<T>(layer.a, layer.a_stride, rows, layer.inputs, first_row, k, own_a);
    load_own<V>(layer.v, layer.v_stride, layer.outputs, layer.inputs, first_column, k, own_v);
  };
  load_slice(0);
#pragma unroll 1
  for (int64_t k = 0; k < layer.inputs; k += fma_inputs) {
    store_own<A>(own_a, slice.a);
    store_own<A>(own_v, slice.v);
    sync_block();
    load_slice(k + fma_inputs);  // on its way during the arithmetic; zeros beyond the last
#pragma unroll
    for (int i = 0; i < fma_inputs; ++i) {
      A a[n], v[n];
#pragma unroll
      for (int j = 0; j < n; ++j) a[j] = slice.a[i][y + 16 * j], v[j] = slice.v[i][x + 16 * j];
#pragma unroll
      for (int r = 0; r < n; ++r)
#pragma unroll
        for (int c = 0; c < n; ++c) sums[r][c] += a[r] * v[c];
    }
    sync_block();
  }
  const A* bias = static_cast<const A*>(layer.v_bias);
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int64_t row = first_row + y + 16 * r;
    double sum = 0;
#pragma unroll
    for (int c = 0; c < n; ++c) {
      const int64_t column = first_column + x + 16 * c;
      if (row >= rows || column >= layer.outputs) continue;
      const A change = sums[r][c] + (bias ? read_only(bias + column) : A(0));
      sum += double(change * A(load(read_only(static_cast<const T*>(layer.b) + row * layer.b_stride + column))));
    }
    sum = sum_over_lanes(sum, 16);
    if (x == 0 && row < rows) partials[row * column_tiles + index.column] = sum;
  }
}

bool on_tensor_cores(const DeviceLinear& layer) {
  return layer.dtype == layer.v_dtype && (layer.dtype == DType::bfloat16 || layer.dtype == DType::float16);
}

int64_t tile_size(const DeviceLinear& layer) {
  if (on_tensor_cores(layer)) return mma_tile;
  return layer.dtype == DType::float64 ? fma_tile<double> : fma_tile<float>;
}

int64_t column_tiles(const DeviceLinear& layer) { return ceil_div(layer.outputs, tile_size(layer)); }

cudaError_t launch_linear(const DeviceLinear& layer, int64_t rows, double* partials, Stream stream) {
  const int64_t columns = column_tiles(layer);
  const Shape shape{ceil_div(rows, tile_size(layer)) * columns, tile_threads};
  if (on_tensor_cores(layer)) {
    const Shape with_stages{shape.blocks, shape.threads, mma_shared_bytes};
    return layer.dtype == DType::bfloat16
               ? launch(linear_mma<bfloat16>, with_stages, stream, layer, rows, columns, partials)
               : launch(linear_mma<float16>, with_stages, stream, layer, rows, columns, partials);
  }
  switch (layer.dtype) {
    case DType::float64:
      return launch(linear_fma<double, double>, shape, stream, layer, rows, columns, partials);
    case DType::bfloat16:
      return launch(linear_fma<bfloat16, float>, shape, stream, layer, rows, columns, partials);
    case DType::float16:
      return launch(linear_fma<float16, float>, shape, stream, layer, rows, columns, partials);
    default:
      return launch(linear_fma<float, float>, shape, stream, layer, rows, columns, partials);
  }
}

// ---- Embeddings and norms: a warp a row ------------------------------------------------------------------------------

constexpr int rows_per_block = 8;

// The row of a warp, or -1.
__device__ __forceinline__ int64_t row_of_warp(int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * rows_per_block + threadIdx.x / warp_lanes;
  return row < rows ? row : -1;
}

// sum over j of f(x_j, y_j, j), by a warp
template <typename T, typename F>
__device__ __forceinline__ double sum_over_row(const T* x, const T* y, int64_t size, const F& f) {
  using A = acc_t<T>;
  const int lane = int(threadIdx.x) % warp_lanes;
  const Span whole = span_of(x, size, 0, 1);
  double sum = 0;
  for_own<T>(aligned_alike(x, y) ? whole : by_element(whole), lane, warp_lanes, [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    A of_x[n], of_y[n], part = 0;
    InGlobal<T>{x}.read(j, of_x);
    InGlobal<T>{y}.read(j, of_y);
    for (int i = 0; i < n; ++i) part += f(of_x[i], of_y[i], j + i);
    sum += double(part);
  });
  return sum_over_lanes(sum, warp_lanes);
}

template <typename T>
__global__ void __launch_bounds__(rows_per_block* warp_lanes)
    embedding_rows(const DeviceEmbedding layer, int64_t rows, double* partials) {
  using A = acc_t<T>;
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const int64_t entry = layer.index[row];
  const bool valid = entry >= 0 && entry < layer.entries;
  double sum = double(NAN);
  if (valid)
    sum = sum_over_row(static_cast<const T*>(layer.b) + row * layer.b_stride,
                       static_cast<const T*>(layer.v) + entry * layer.v_stride, layer.width,
                       [](A b, A v, int64_t) { return b * v; });
  if (threadIdx.x % warp_lanes == 0) partials[row] = sum;
}

template <typename T>
__global__ void __launch_bounds__(rows_per_block* warp_lanes)
    norm_rows(const DeviceNorm layer, int64_t rows, double* partials) {
  using A = acc_t<T>;
  const int64_t row = row_of_warp(rows);
  if (row < 0) return;
  const A *v_weight = static_cast<const A*>(layer.v_weight), *v_bias = static_cast<const A*>(layer.v_bias);
  const A mean = layer.mean ? static_cast<const A*>(layer.mean)[row] : A(0);
  const A rstd = static_cast<const A*>(layer.rstd)[row];
  const double sum = sum_over_row(static_cast<const T*>(layer.x) + row * layer.x_stride,
                                  static_cast<const T*>(layer.b) + row * layer.b_stride, layer.width,
                                  [&](A x, A b, int64_t j) {
                                    const A scaled = v_weight ? read_only(v_weight + j) * ((x - mean) * rstd) : A(0);
                                    return b * (scaled + (v_bias ? read_only(v_bias + j) : A(0)));
                                  });
  if (threadIdx.x % warp_lanes == 0) partials[row] = sum;
}

// kernel, one of the four types', on every row
template <typename Layer, typename Kernel>
cudaError_t launch_rows(Kernel of_float, Kernel of_double, Kernel of_bfloat16, Kernel of_float16, const Layer& layer,
                        int64_t rows, double* partials, Stream stream) {
  const Shape shape{ceil_div(rows, rows_per_block), rows_per_block * warp_lanes};
  switch (layer.dtype) {
    case DType::float64:
      return launch(of_double, shape, stream, layer, rows, partials);
    case DType::bfloat16:
      return launch(of_bfloat16, shape, stream, layer, rows, partials);
    case DType::float16:
      return launch(of_float16, shape, stream, layer, rows, partials);
    default:
      return launch(of_float, shape, stream, layer, rows, partials);
  }
}

}  // namespace

int64_t partials_of(const DeviceLinear& layer, int64_t rows) { return rows * column_tiles(layer); }

cudaError_t run_linear(const DeviceLinear& layer, const Samples& samples, double* partials, void* out,
                       cudaStream_t stream) {
  if (samples.samples == 0) return cudaSuccess;
  if (partials_of(layer, samples.rows) > 0)
    if (const cudaError_t error = launch_linear(layer, samples.rows, partials, stream)) return error;
  return sum_rows(layer.dtype, partials, column_tiles(layer), samples, out, stream);
}

cudaError_t run_embedding(const DeviceEmbedding& layer, const Samples& samples, double* partials, void* out,
                          cudaStream_t stream) {
  if (samples.samples == 0) return cudaSuccess;
  if (samples.rows > 0)
    if (const cudaError_t error =
            launch_rows(embedding_rows<float>, embedding_rows<double>, embedding_rows<bfloat16>,
                        embedding_rows<float16>, layer, samples.rows, partials, stream))
      return error;
  return sum_rows(layer.dtype, partials, 1, samples, out, stream);
}

cudaError_t run_norm(const DeviceNorm& layer, const Samples& samples, double* partials, void* out,
                     cudaStream_t stream) {
  if (samples.samples == 0) return cudaSuccess;
  if (samples.rows > 0)
    if (const cudaError_t error = launch_rows(norm_rows<float>, norm_rows<double>, norm_rows<bfloat16>,
                                              norm_rows<float16>, layer, samples.rows, partials, stream))
      return error;
  return sum_rows(layer.dtype, partials, 1, samples, out, stream);
}

}  // namespace synkern
