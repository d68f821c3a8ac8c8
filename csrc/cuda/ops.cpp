// The operators at the CUDA key: argument checks, allocation, and the launches of rows.h and contraction.h on the
// current stream of the operands' device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/contraction.h"
#include "cuda/rows.h"
#include "torch/contraction_operands.h"
#include "torch/operands.h"

namespace synkern {
namespace {

void check_device(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), "synkern: ", name,
                  " must be on the device of the other operands, cuda:", like.get_device_index(), "; use ", name,
                  ".to('cuda:", like.get_device_index(), "')");
}

void check_device(const MaybeTensor& x, const char* name, const Tensor& like) {
  if (x.has_value()) check_device(*x, name, like);
}

// Makes the operands' device current; launches go to its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

const Tensor& checked(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, const MaybeTensor& ratio,
                      const MaybeTensor& class_weight, const Tensor* statistics) {
  check_device(target, "target", logits);
  check_device(weight, "weight", logits);
  check_device(ratio, "ratio", logits);
  check_device(class_weight, "class_weight", logits);
  if (statistics) check_device(*statistics, "statistics", logits);
  return logits;
}

struct Problem : OnDevice, Operands {
  DeviceRows device{};
  MaybeTensor scratch;

  Problem(const Tensor& logits_, const Tensor& target_, const MaybeTensor& weight_, const MaybeTensor& ratio_,
          const MaybeTensor& class_weight_, const Tensor* statistics_, const Options& options)
      : OnDevice(checked(logits_, target_, weight_, ratio_, class_weight_, statistics_)),
        Operands(logits_, target_, weight_, ratio_, class_weight_, statistics_, options) {
    device.rows = rows;
    const bool forward = !statistics_;
    if (sums_class_weights(rows) || (forward && !takes_one_launch(rows)))
      scratch = new_tensor(logits_, {scratch_numbers}, ScalarType::Double);
    STD_CUDA_CHECK(take_class_weights(device, scratch_data(), stream()));
  }

  double* scratch_data() const {
    return scratch.has_value() ? static_cast<double*>(scratch->mutable_data_ptr()) : nullptr;
  }

  Tensor new_matrix() const {
    return new_tensor(logits.tensor, {rows.rows, rows.classes}, logits.tensor.scalar_type());
  }
  Tensor new_scalar() const { return new_tensor(logits.tensor, {}, accumulate()); }

  const void* scalar_data(const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 0 && grad.scalar_type() == accumulate(),
                    "synkern::row_loss_backward: expected a 0-d tensor of the loss's dtype");
    check_device(grad, "grad", logits.tensor);
    return grad.const_data_ptr();
  }

  // A row operand of an operator that was given `x`.
  MaybeTensor row_vector(const MaybeTensor& x, const char* name) const {
    check_device(x, name, logits.tensor);
    return vector(x, name, rows.rows, accumulate());
  }

  Matrix direction_on_device(const Tensor& v) const {
    check_device(v, "v", logits.tensor);
    return direction(v);
  }

  const RowLaunchers& kernels() const { return row_launchers(rows.dtype); }
};

std::tuple<Tensor, Tensor> row_loss(const Tensor& logits, const Tensor& target, MaybeTensor weight, MaybeTensor ratio,
                                    MaybeTensor class_weight, int64_t loss, double p0, double p1, double p2,
                                    double label_smoothing, double z_loss, int64_t ignore_index, int64_t reduction) {
  const Problem problem(logits, target, weight, ratio, class_weight, nullptr,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const bool reduced = Reduction(reduction) != Reduction::none;
  Tensor losses = problem.new_vector(), total = reduced ? problem.new_scalar() : losses;
  STD_CUDA_CHECK(run_forward(problem.device,
                             {Reduction(reduction), losses.mutable_data_ptr(), nullptr, nullptr,
                              reduced ? total.mutable_data_ptr() : nullptr, problem.scratch_data()},
                             problem.stream()));
  return {total, problem.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_loss_and_gradient(const Tensor& logits, const Tensor& target,
                                                                 MaybeTensor weight, MaybeTensor ratio,
                                                                 MaybeTensor class_weight, int64_t loss, double p0,
                                                                 double p1, double p2, double label_smoothing,
                                                                 double z_loss, int64_t ignore_index,
                                                                 int64_t reduction) {
  STD_TORCH_CHECK(Reduction(reduction) != Reduction::none, "synkern::row_loss_and_gradient: the loss must be reduced");
  const Problem problem(logits, target, weight, ratio, class_weight, nullptr,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  Tensor losses = problem.new_vector(), total = problem.new_scalar();
  Tensor gradient = problem.new_matrix(), grad_weight = problem.new_grad_weight();
  STD_CUDA_CHECK(run_forward(problem.device,
                             {Reduction(reduction), losses.mutable_data_ptr(), gradient.mutable_data_ptr(),
                              problem.grad_weight_data(grad_weight), total.mutable_data_ptr(),
                              problem.scratch_data()},
                             problem.stream()));
  return {total, problem.statistics, gradient, grad_weight};
}

void row_loss_rescale(const Tensor& grad, const Tensor& gradient, const Tensor& grad_weight, const Tensor& logits,
                      const Tensor& target, MaybeTensor weight, MaybeTensor ratio, MaybeTensor class_weight,
                      const Tensor& statistics, int64_t loss, double p0, double p1, double p2, double label_smoothing,
                      double z_loss, int64_t ignore_index) {
  const Problem problem(logits, target, weight, ratio, class_weight, &statistics,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  check_device(gradient, "grad_logits", logits);
  STD_TORCH_CHECK(gradient.is_contiguous(), "synkern::row_loss_rescale: grad_logits must be contiguous");
  STD_CUDA_CHECK(run_rescale(problem.device, problem.scalar_data(grad), gradient.mutable_data_ptr(),
                             problem.grad_weight_data(grad_weight), problem.stream()));
}

std::tuple<Tensor, Tensor> row_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                             MaybeTensor weight, MaybeTensor ratio, MaybeTensor class_weight,
                                             const Tensor& statistics, int64_t loss, double p0, double p1, double p2,
                                             double label_smoothing, double z_loss, int64_t ignore_index,
                                             int64_t reduction) {
  const Problem problem(logits, target, weight, ratio, class_weight, &statistics,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const bool reduced = Reduction(reduction) != Reduction::none;
  MaybeTensor row_grad;
  if (!reduced) row_grad = problem.row_vector(grad, "grad");
  Tensor gradient = problem.new_matrix(), grad_weight = problem.new_grad_weight();
  const BackwardOutputs outputs{data_of(row_grad), reduced ? problem.scalar_data(grad) : nullptr, false,
                                gradient.mutable_data_ptr(), problem.grad_weight_data(grad_weight)};
  STD_CUDA_CHECK(problem.kernels().backward(problem.device, outputs, problem.stream()));
  return {gradient, grad_weight};
}

Tensor row_loss_tangent(const Tensor& v, MaybeTensor coefficient, const Tensor& logits, const Tensor& target,
                        MaybeTensor ratio, MaybeTensor class_weight, const Tensor& statistics, int64_t loss, double p0,
                        double p1, double p2, double label_smoothing, double z_loss, int64_t ignore_index) {
  const Problem problem(logits, target, std::nullopt, ratio, class_weight, &statistics,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const Matrix direction = problem.direction_on_device(v);
  const MaybeTensor k = problem.row_vector(coefficient, "coefficient");
  Tensor directional = problem.new_vector();
  STD_CUDA_CHECK(problem.kernels().tangent(
      problem.device,
      {direction.tensor.const_data_ptr(), direction.stride, data_of(k), directional.mutable_data_ptr()},
      problem.stream()));
  return directional;
}

std::tuple<Tensor, Tensor> row_loss_hvp(const Tensor& v, const Tensor& coefficient, MaybeTensor extra,
                                        const Tensor& logits, const Tensor& target, MaybeTensor ratio,
                                        MaybeTensor class_weight, const Tensor& statistics, int64_t loss, double p0,
                                        double p1, double p2, double label_smoothing, double z_loss,
                                        int64_t ignore_index) {
  const Problem problem(logits, target, std::nullopt, ratio, class_weight, &statistics,
                        {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const Matrix direction = problem.direction_on_device(v);
  const MaybeTensor k = problem.row_vector(coefficient, "coefficient"), e = problem.row_vector(extra, "extra");
  Tensor out = problem.new_matrix(), directional = problem.new_vector();
  STD_CUDA_CHECK(problem.kernels().hvp(problem.device,
                                       {direction.tensor.const_data_ptr(), direction.stride, data_of(k), data_of(e),
                                        out.mutable_data_ptr(), directional.mutable_data_ptr()},
                                       problem.stream()));
  return {out, directional};
}

// ---- Contractions ----------------------------------------------------------------------------------------------------

struct Outputs {
  Tensor partials, out;
  Outputs(const Tensor& like, int64_t partials_, int64_t samples)
      : partials(new_tensor(like, {partials_}, ScalarType::Double)),
        out(new_tensor(like, {samples}, accumulate_type(like))) {}
  double* partials_data() const { return static_cast<double*>(partials.mutable_data_ptr()); }
};

Samples samples_of(const MaybeTensor& index, int64_t samples, int64_t rows) {
  return {index.has_value() ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr, samples, rows};
}

Tensor linear_contraction(const Tensor& a, const Tensor& b, const Tensor& v, MaybeTensor v_bias, MaybeTensor sample,
                          int64_t samples) {
  check_device(a, "a", b);
  check_device(v, "v", b);
  check_device(v_bias, "v_bias", b);
  check_device(sample, "sample", b);
  const OnDevice here(b);
  const LinearOperands o(a, b, v, v_bias);
  const MaybeTensor index = sample_index(sample, samples, o.rows);
  const DeviceLinear layer{dtype_of(b, "b"),
                           dtype_of(v, "v"),
                           o.a.tensor.const_data_ptr(),
                           o.b.tensor.const_data_ptr(),
                           o.v.tensor.const_data_ptr(),
                           data_of(o.v_bias),
                           o.a.stride,
                           o.b.stride,
                           o.v.stride,
                           o.inputs,
                           o.outputs};
  const Outputs outputs(b, partials_of(layer, o.rows), samples);
  STD_CUDA_CHECK(run_linear(layer, samples_of(index, samples, o.rows), outputs.partials_data(),
                            outputs.out.mutable_data_ptr(), here.stream()));
  return outputs.out;
}

Tensor embedding_contraction(const Tensor& index_, const Tensor& b, const Tensor& v, MaybeTensor sample,
                             int64_t samples) {
  check_device(index_, "index", b);
  check_device(v, "v", b);
  check_device(sample, "sample", b);
  const OnDevice here(b);
  const EmbeddingOperands o(index_, b, v);
  const MaybeTensor index = sample_index(sample, samples, o.rows);
  const DeviceEmbedding layer{dtype_of(b, "b"),
                              static_cast<const int64_t*>(o.index.const_data_ptr()),
                              o.b.tensor.const_data_ptr(),
                              o.v.tensor.const_data_ptr(),
                              o.b.stride,
                              o.v.stride,
                              o.width,
                              o.entries};
  const Outputs outputs(b, o.rows, samples);
  STD_CUDA_CHECK(run_embedding(layer, samples_of(index, samples, o.rows), outputs.partials_data(),
                               outputs.out.mutable_data_ptr(), here.stream()));
  return outputs.out;
}

Tensor norm_contraction(const Tensor& x, const Tensor& b, MaybeTensor mean, const Tensor& rstd, MaybeTensor v_weight,
                        MaybeTensor v_bias, MaybeTensor sample, int64_t samples) {
  check_device(x, "x", b);
  check_device(mean, "mean", b);
  check_device(rstd, "rstd", b);
  check_device(v_weight, "v_weight", b);
  check_device(v_bias, "v_bias", b);
  check_device(sample, "sample", b);
  const OnDevice here(b);
  const NormOperands o(x, b, mean, rstd, v_weight, v_bias);
  const MaybeTensor index = sample_index(sample, samples, o.rows);
  const DeviceNorm layer{dtype_of(b, "b"),
                         o.x.tensor.const_data_ptr(),
                         o.b.tensor.const_data_ptr(),
                         data_of(o.mean),
                         o.rstd.const_data_ptr(),
                         data_of(o.v_weight),
                         data_of(o.v_bias),
                         o.x.stride,
                         o.b.stride,
                         o.width};
  const Outputs outputs(b, o.rows, samples);
  STD_CUDA_CHECK(run_norm(layer, samples_of(index, samples, o.rows), outputs.partials_data(),
                          outputs.out.mutable_data_ptr(), here.stream()));
  return outputs.out;
}

}  // namespace
}  // namespace synkern

STABLE_TORCH_LIBRARY_IMPL(synkern, CUDA, m) {
  m.impl("row_loss", TORCH_BOX(&synkern::row_loss));
  m.impl("row_loss_and_gradient", TORCH_BOX(&synkern::row_loss_and_gradient));
  m.impl("row_loss_rescale", TORCH_BOX(&synkern::row_loss_rescale));
  m.impl("row_loss_backward", TORCH_BOX(&synkern::row_loss_backward));
  m.impl("row_loss_tangent", TORCH_BOX(&synkern::row_loss_tangent));
  m.impl("row_loss_hvp", TORCH_BOX(&synkern::row_loss_hvp));
  m.impl("linear_contraction", TORCH_BOX(&synkern::linear_contraction));
  m.impl("embedding_contraction", TORCH_BOX(&synkern::embedding_contraction));
  m.impl("norm_contraction", TORCH_BOX(&synkern::norm_contraction));
}
