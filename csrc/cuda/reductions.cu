// Sums over rows, each in one order whatever the device: the mean's denominator, the loss, the class weights.
#include "cuda/row_kernels.cuh"

namespace synkern {

extern const RowLaunchers row_launchers_float, row_launchers_double, row_launchers_bfloat16, row_launchers_float16;

const RowLaunchers& row_launchers(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return row_launchers_double;
    case DType::bfloat16:
      return row_launchers_bfloat16;
    case DType::float16:
      return row_launchers_float16;
    default:
      return row_launchers_float;
  }
}

namespace {

constexpr int reduction_threads = 1024;
constexpr int64_t rows_per_partial = 4096;

struct Chunk {
  int64_t begin, end;
};

__device__ __forceinline__ Chunk own_chunk(int64_t n) {
  const int64_t size = ceil_div(n, gridDim.x), begin = smaller(blockIdx.x * size, n);
  return {begin, smaller(begin + size, n)};
}

template <typename A>
__global__ void __launch_bounds__(reduction_threads) kept_weight_kernel(const DeviceRows p, double* partials) {
  SYNKERN_SHARED(BlockSlots, slots);
  const Chunk chunk = own_chunk(p.rows.rows);
  const double sum = sum_over_block(sum_of_kept_weights<A>(p.rows, chunk.begin, chunk.end), slots);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// loss null: leaves the block's partial sum. Otherwise one block, which divides and writes the loss.
template <typename A>
__global__ void __launch_bounds__(reduction_threads)
    loss_sum_kernel(const A* losses, int64_t n, const Denominator denominator, double* partials, A* loss) {
  SYNKERN_SHARED(BlockSlots, slots);
  const Chunk chunk = own_chunk(n);
  const double sum = sum_over_block(sum_of_losses(losses, chunk.begin, chunk.end), slots);
  const double divisor = loss ? value_of(denominator) : 1.0;
  if (threadIdx.x != 0) return;
  if (loss)
    *loss = A(sum / divisor);
  else
    partials[blockIdx.x] = sum;
}

// By one warp.
template <typename A>
__global__ void loss_kernel(const Denominator partial_sums, const Denominator denominator, A* loss) {
  const double sum = value_of(partial_sums), divisor = value_of(denominator);
  if (threadIdx.x == 0) *loss = A(sum / divisor);
}

template <typename A>
__global__ void __launch_bounds__(reduction_threads) class_weight_sum_kernel(const A* weights, int64_t n, double* sum) {
  SYNKERN_SHARED(BlockSlots, slots);
  const double total = sum_over_block(sum_of_losses(weights, 0, n), slots);
  if (threadIdx.x == 0) *sum = total;
}

__global__ void __launch_bounds__(256) scale_float32_kernel(float* x, int64_t n, const float* factor) {
  const float by = *factor;
  if (by == 1.f) return;
  const int rank = int(threadIdx.x);
  const Span s = span_of(x, n, int(blockIdx.x), int(gridDim.x));
  for_own<float>(s, rank, int(blockDim.x), [&](auto count, int64_t j) {
    constexpr int size = decltype(count)::value;
    float y[size];
    if constexpr (size == 1)
      y[0] = x[j];
    else
      unpack<float>(*reinterpret_cast<const uint4*>(x + j), y);
    for (float& each : y) each *= by;
    write(x + j, y);
  });
}

int partials_of(int64_t rows) { return int(smaller(most_partials, ceil_div(rows, rows_per_partial) + (rows == 0))); }

template <typename A>
cudaError_t sum_losses(const A* losses, int64_t n, const Denominator& denominator, double* partials, A* loss,
                       Stream stream) {
  constexpr int64_t one_block = 16 * 1024;
  if (n <= one_block)
    return launch(loss_sum_kernel<A>, {1, reduction_threads}, stream, losses, n, denominator, partials, loss);
  const int blocks = partials_of(n);
  const cudaError_t error = launch(loss_sum_kernel<A>, {blocks, reduction_threads}, stream, losses, n, denominator,
                                   partials, static_cast<A*>(nullptr));
  if (error) return error;
  return launch(loss_kernel<A>, {1, warp_lanes}, stream, Denominator{partials, blocks}, denominator, loss);
}

template <typename A>
cudaError_t take_kept_weight(const DeviceRows& p, double* partials, Denominator& denominator, Stream stream) {
  denominator = {partials, partials_of(p.rows.rows)};
  return launch(kept_weight_kernel<A>, {denominator.count, reduction_threads}, stream, p, partials);
}

template <typename A>
cudaError_t forward_and_sum(const DeviceRows& p, const ForwardRequest& request, Stream stream) {
  const RowLaunchers& kernels = row_launchers(p.rows.dtype);
  const bool alone = kernels.alone(p.rows), mean = request.reduction == Reduction::mean;
  ForwardOutputs o{request.losses, request.gradient, request.grad_weight, {nullptr, 0}, alone, mean,
                   alone ? request.loss : nullptr};
  cudaError_t error = cudaSuccess;
  if (mean && !alone) error = take_kept_weight<A>(p, request.scratch, o.denominator, stream);
  if (!error && p.rows.rows > 0) error = kernels.forward(p, o, stream);
  if (error || alone || !request.loss) return error;
  return sum_losses(static_cast<const A*>(request.losses), p.rows.rows, o.denominator, request.scratch + most_partials,
                    static_cast<A*>(request.loss), stream);
}

cudaError_t scale_float32(float* x, int64_t n, const float* factor, Stream stream) {
  if (n == 0) return cudaSuccess;
  constexpr int64_t elements_per_block = 16 * 1024, most_blocks = 4096;
  return launch(scale_float32_kernel, {smaller(most_blocks, ceil_div(n, elements_per_block)), 256}, stream, x, n,
                factor);
}

}  // namespace

bool sums_class_weights(const Rows& r) { return r.class_weight && r.loss.label_smoothing != 0.0; }

bool takes_one_launch(const Rows& r) { return row_launchers(r.dtype).alone(r); }

cudaError_t take_class_weights(DeviceRows& p, double* scratch, cudaStream_t stream) {
  p.class_weight_sum = nullptr;
  if (!sums_class_weights(p.rows)) return cudaSuccess;
  double* sum = scratch + 2 * most_partials;
  p.class_weight_sum = sum;
  const Shape shape{1, reduction_threads};
  if (p.rows.dtype == DType::float64)
    return launch(class_weight_sum_kernel<double>, shape, stream, static_cast<const double*>(p.rows.class_weight),
                  p.rows.classes, sum);
  return launch(class_weight_sum_kernel<float>, shape, stream, static_cast<const float*>(p.rows.class_weight),
                p.rows.classes, sum);
}

cudaError_t run_forward(const DeviceRows& p, const ForwardRequest& request, cudaStream_t stream) {
  return p.rows.dtype == DType::float64 ? forward_and_sum<double>(p, request, stream)
                                        : forward_and_sum<float>(p, request, stream);
}

cudaError_t run_rescale(const DeviceRows& p, const void* grad, void* gradient, void* grad_weight,
                        cudaStream_t stream) {
  if (p.rows.rows == 0) return cudaSuccess;
  if (p.rows.dtype != DType::float32)
    return row_launchers(p.rows.dtype).backward(p, {nullptr, grad, true, gradient, grad_weight}, stream);
  const float* factor = static_cast<const float*>(grad);
  const cudaError_t error =
      scale_float32(static_cast<float*>(gradient), p.rows.rows * p.rows.classes, factor, stream);
  if (error || !grad_weight) return error;
  return scale_float32(static_cast<float*>(grad_weight), p.rows.rows, factor, stream);
}

}  // namespace synkern
