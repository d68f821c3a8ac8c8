// The meta-gradient's operators: schemas, argument checks and CPU launchers.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "core/contraction.h"
#include "torch/contraction_operands.h"

namespace synkern {
namespace {

// Which sample a row belongs to.
class Samples {
 public:
  Samples(const MaybeTensor& sample, int64_t samples, int64_t rows)
      : samples_(samples), rows_(rows), index_(sample_index(sample, samples, rows)) {}

  // In row order, in double: the same bits whatever the number of threads.
  Tensor sum(const double* by_row, const Tensor& like) const {
    std::unique_ptr<double[]> sums(new double[size_t(samples_)]());
    const int64_t* index = index_.has_value() ? static_cast<const int64_t*>(index_->const_data_ptr()) : nullptr;
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t n = index ? index[row] : row / (rows_ / samples_);
      STD_TORCH_CHECK(n >= 0 && n < samples_, "synkern: sample[", row, "] is ", n, ", expected one of ", samples_);
      sums[size_t(n)] += by_row[row];
    }
    Tensor result = new_tensor(like, {samples_}, accumulate_type(like));
    for (int64_t n = 0; n < samples_; ++n) {
      if (accumulate_type(like) == ScalarType::Double)
        static_cast<double*>(result.mutable_data_ptr())[n] = sums[size_t(n)];
      else
        static_cast<float*>(result.mutable_data_ptr())[n] = float(sums[size_t(n)]);
    }
    return result;
  }

 private:
  int64_t samples_, rows_;
  MaybeTensor index_;
};

// f(out, begin, end) over the rows; work = multiply-adds a row.
template <typename F>
Tensor sum_by_sample(const Samples& samples, const Tensor& b, int64_t work, const F& f) {
  constexpr int64_t work_per_task = 1 << 20;  // some 20 us, above the cost of waking a thread
  const int64_t rows = b.size(0), grain = 1 + work_per_task / (work + 1);
  std::unique_ptr<double[]> by_row(new double[size_t(rows)]);
  if (rows <= grain)
    f(by_row.get(), 0, rows);
  else
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { f(by_row.get(), begin, end); });
  return samples.sum(by_row.get(), b);
}

Tensor linear_contraction(const Tensor& a, const Tensor& b, const Tensor& v, MaybeTensor v_bias, MaybeTensor sample,
                          int64_t samples) {
  const LinearOperands o(a, b, v, v_bias);
  LinearContraction layer{dtype_of(b, "b"), o.a.tensor.const_data_ptr(), o.b.tensor.const_data_ptr(), nullptr,
                          data_of(o.v_bias), o.a.stride, o.b.stride, o.inputs, o.outputs};
  const ContractionKernels& kernels = contraction_kernels();
  const Tensor packed = new_tensor(b, {kernels.packed_size(layer.outputs, layer.inputs)}, accumulate_type(b));
  kernels.pack(dtype_of(v, "v"), o.v.tensor.const_data_ptr(), o.v.stride, layer.outputs, layer.inputs,
               packed.mutable_data_ptr());
  layer.packed = packed.const_data_ptr();
  return sum_by_sample(Samples(sample, samples, o.rows), b, layer.inputs * layer.outputs,
                       [&](double* out, int64_t begin, int64_t end) { kernels.linear(layer, out, begin, end); });
}

void check_index(const Tensor& index, int64_t entries) {
  const int64_t* values = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t row = 0; row < index.size(0); ++row)
    STD_TORCH_CHECK(values[row] >= 0 && values[row] < entries, "synkern: index[", row, "] is ", values[row],
                    ", expected one of ", entries, " entries of v");
}

Tensor embedding_contraction(const Tensor& index, const Tensor& b, const Tensor& v, MaybeTensor sample,
                             int64_t samples) {
  const EmbeddingOperands o(index, b, v);
  check_index(o.index, o.entries);
  const EmbeddingContraction layer{dtype_of(b, "b"), static_cast<const int64_t*>(o.index.const_data_ptr()),
                                   o.b.tensor.const_data_ptr(), o.v.tensor.const_data_ptr(), o.b.stride, o.v.stride,
                                   o.width};
  return sum_by_sample(
      Samples(sample, samples, o.rows), b, 4 * layer.width,
      [&](double* out, int64_t begin, int64_t end) { contraction_kernels().embedding(layer, out, begin, end); });
}

Tensor norm_contraction(const Tensor& x, const Tensor& b, MaybeTensor mean, const Tensor& rstd, MaybeTensor v_weight,
                        MaybeTensor v_bias, MaybeTensor sample, int64_t samples) {
  const NormOperands o(x, b, mean, rstd, v_weight, v_bias);
  const NormContraction layer{dtype_of(b, "b"), o.x.tensor.const_data_ptr(), o.b.tensor.const_data_ptr(),
                              data_of(o.mean), o.rstd.const_data_ptr(), data_of(o.v_weight), data_of(o.v_bias),
                              o.x.stride, o.b.stride, o.width};
  return sum_by_sample(
      Samples(sample, samples, o.rows), b, 8 * o.width,
      [&](double* out, int64_t begin, int64_t end) { contraction_kernels().norm(layer, out, begin, end); });
}

}  // namespace
}  // namespace synkern

STABLE_TORCH_LIBRARY_FRAGMENT(synkern, m) {
  m.def("linear_contraction(Tensor a, Tensor b, Tensor v, Tensor? v_bias, Tensor? sample, int samples) -> Tensor");
  m.def("embedding_contraction(Tensor index, Tensor b, Tensor v, Tensor? sample, int samples) -> Tensor");
  m.def("norm_contraction(Tensor x, Tensor b, Tensor? mean, Tensor rstd, Tensor? v_weight, Tensor? v_bias, "
        "Tensor? sample, int samples) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(synkern, CPU, m) {
  m.impl("linear_contraction", TORCH_BOX(&synkern::linear_contraction));
  m.impl("embedding_contraction", TORCH_BOX(&synkern::embedding_contraction));
  m.impl("norm_contraction", TORCH_BOX(&synkern::norm_contraction));
}
