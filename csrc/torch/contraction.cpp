// The meta-gradient's operators: schemas, argument checks and CPU launchers.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "core/contraction.h"
#include "torch/tensors.h"

namespace synkern {
namespace {

void check_rows(const Tensor& x, const char* name, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows, "synkern: ", name, " must have shape (", rows, ", ...)");
}

void check_same_type(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "synkern: ", name, " must have the dtype of b");
}

// Which sample a row belongs to.
class Samples {
 public:
  Samples(const MaybeTensor& sample, int64_t samples, int64_t rows) : samples_(samples), rows_(rows) {
    if (sample.has_value()) {
      STD_TORCH_CHECK(sample->dim() == 1 && sample->size(0) == rows && sample->scalar_type() == ScalarType::Long,
                      "synkern: sample must be int64 of shape (", rows, ",)");
      index_ = as_contiguous(*sample);
    } else {
      STD_TORCH_CHECK(samples > 0 ? rows % samples == 0 : rows == 0, "synkern: ", rows,
                      " rows cannot be split into ", samples, " equal samples; pass the sample of each row");
    }
  }

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

Tensor linear_contraction(const Tensor& a_, const Tensor& b_, const Tensor& v_, MaybeTensor v_bias_,
                          MaybeTensor sample, int64_t samples) {
  check_rows(b_, "b", b_.size(0));
  check_rows(a_, "a", b_.size(0));
  check_same_type(a_, "a", b_);
  STD_TORCH_CHECK(v_.dim() == 2 && v_.size(0) == b_.size(1) && v_.size(1) == a_.size(1),
                  "synkern: v must have shape (outputs, inputs) = (", b_.size(1), ", ", a_.size(1), ")");
  STD_TORCH_CHECK(v_.scalar_type() == b_.scalar_type() || v_.scalar_type() == accumulate_type(b_),
                  "synkern: v must have the dtype of b, or float32");
  const Matrix a = matrix(a_), b = matrix(b_), v = matrix(v_);
  const MaybeTensor v_bias = vector(v_bias_, "v_bias", b_.size(1), accumulate_type(b_));
  LinearContraction layer{dtype_of(b_, "b"), a.tensor.const_data_ptr(), b.tensor.const_data_ptr(), nullptr,
                          data_of(v_bias), a.stride, b.stride, a_.size(1), b_.size(1)};
  const ContractionKernels& kernels = contraction_kernels();
  const Tensor packed = new_tensor(b_, {kernels.packed_size(layer.outputs, layer.inputs)}, accumulate_type(b_));
  kernels.pack(dtype_of(v_, "v"), v.tensor.const_data_ptr(), v.stride, layer.outputs, layer.inputs,
               packed.mutable_data_ptr());
  layer.packed = packed.const_data_ptr();
  return sum_by_sample(Samples(sample, samples, b_.size(0)), b_, layer.inputs * layer.outputs,
                       [&](double* out, int64_t begin, int64_t end) { kernels.linear(layer, out, begin, end); });
}

void check_index(const Tensor& index, int64_t entries) {
  const int64_t* values = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t row = 0; row < index.size(0); ++row)
    STD_TORCH_CHECK(values[row] >= 0 && values[row] < entries, "synkern: index[", row, "] is ", values[row],
                    ", expected one of ", entries, " entries of v");
}

Tensor embedding_contraction(const Tensor& index_, const Tensor& b_, const Tensor& v_, MaybeTensor sample,
                             int64_t samples) {
  check_rows(b_, "b", b_.size(0));
  check_same_type(v_, "v", b_);
  STD_TORCH_CHECK(index_.dim() == 1 && index_.size(0) == b_.size(0) && index_.scalar_type() == ScalarType::Long,
                  "synkern: index must be int64 of shape (", b_.size(0), ",)");
  STD_TORCH_CHECK(v_.dim() == 2 && v_.size(1) == b_.size(1), "synkern: v must have shape (entries, ", b_.size(1), ")");
  const Tensor index = as_contiguous(index_);
  check_index(index, v_.size(0));
  const Matrix b = matrix(b_), v = matrix(v_);
  const EmbeddingContraction layer{dtype_of(b_, "b"), static_cast<const int64_t*>(index.const_data_ptr()),
                                   b.tensor.const_data_ptr(), v.tensor.const_data_ptr(), b.stride, v.stride,
                                   b_.size(1)};
  return sum_by_sample(
      Samples(sample, samples, b_.size(0)), b_, 4 * layer.width,
      [&](double* out, int64_t begin, int64_t end) { contraction_kernels().embedding(layer, out, begin, end); });
}

Tensor norm_contraction(const Tensor& x_, const Tensor& b_, MaybeTensor mean_, const Tensor& rstd_,
                        MaybeTensor v_weight_, MaybeTensor v_bias_, MaybeTensor sample, int64_t samples) {
  check_rows(b_, "b", b_.size(0));
  check_rows(x_, "x", b_.size(0));
  check_same_type(x_, "x", b_);
  STD_TORCH_CHECK(x_.size(1) == b_.size(1), "synkern: x and b must have the same shape");
  const ScalarType type = accumulate_type(b_);
  const int64_t rows = b_.size(0), width = b_.size(1);
  const Matrix x = matrix(x_), b = matrix(b_);
  const MaybeTensor mean = vector(mean_, "mean", rows, type), v_weight = vector(v_weight_, "v_weight", width, type),
                    v_bias = vector(v_bias_, "v_bias", width, type);
  const Tensor rstd = vector(rstd_, "rstd", rows, type);
  const NormContraction layer{dtype_of(b_, "b"),   x.tensor.const_data_ptr(), b.tensor.const_data_ptr(), data_of(mean),
                              rstd.const_data_ptr(), data_of(v_weight),       data_of(v_bias),           x.stride,
                              b.stride,            width};
  return sum_by_sample(
      Samples(sample, samples, rows), b_, 8 * width,
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
