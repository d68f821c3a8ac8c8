// Operator schemas, argument checks and the CPU launchers, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/output_memory.h"
#include "torch/operands.h"

namespace synkern {
namespace {

// In row order, in double: the same bits whatever the number of threads.
double ordered_sum(const void* x, int64_t n, ScalarType type) {
  double sum = 0;
  if (type == ScalarType::Double) {
    for (int64_t i = 0; i < n; ++i) sum += static_cast<const double*>(x)[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sum += double(static_cast<const float*>(x)[i]);
  }
  return sum;
}

void fill(const Tensor& x, int64_t begin, int64_t n, double value) {
  if (x.scalar_type() == ScalarType::Double) {
    double* p = static_cast<double*>(x.mutable_data_ptr()) + begin;
    for (int64_t i = 0; i < n; ++i) p[i] = value;
  } else {
    float* p = static_cast<float*>(x.mutable_data_ptr()) + begin;
    for (int64_t i = 0; i < n; ++i) p[i] = float(value);
  }
}

struct Problem : Operands {
  Problem(const Tensor& logits_, const Tensor& target_, const MaybeTensor& weight_, const MaybeTensor& ratio_,
          const MaybeTensor& class_weight_, const Tensor* statistics_, const Options& options)
      : Operands(logits_, target_, weight_, ratio_, class_weight_, statistics_, options) {
    if (options.label_smoothing != 0.0 && class_weight.has_value())
      rows.class_weight_sum = ordered_sum(rows.class_weight, rows.classes, accumulate());
  }

  void check_targets() const {
    const int64_t bad = first_bad_target(rows);
    STD_TORCH_CHECK(bad < 0, "synkern: target[", bad, "] is ", target_at(rows, bad), ", expected a class in [0, ",
                    rows.classes, ") or ignore_index (", rows.ignore_index,
                    "); correct the label, or mark the row with ignore_index");
  }

  // What the reduction divides by, also written to every row of the statistics.
  double denominator(int64_t reduction) const {
    const double value = Reduction(reduction) == Reduction::mean ? kept_weight(rows) : 1.0;
    fill(statistics, stat_denominator * rows.rows, rows.rows, value);
    return value;
  }

  // Uninitialised: every kernel writes every row.
  Tensor new_matrix() const {
    const ScalarType type = logits.tensor.scalar_type();
    const int64_t bytes = rows.rows * rows.classes * int64_t(logits.tensor.element_size());
    void* data = bytes >= large_output ? allocate_output(bytes) : nullptr;
    if (!data) return new_tensor(logits.tensor, {rows.rows, rows.classes}, type);
    const int64_t sizes[] = {rows.rows, rows.classes}, strides[] = {rows.classes, 1};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, logits.tensor.device(), type, &release_output);
  }

  void forward(void* losses) const {
    for_rows([&](int64_t b, int64_t e) { row_kernels().forward(rows, losses, b, e); });
  }

  template <typename F>
  void for_rows(const F& f) const {
    const int64_t grain = row_grain(rows.classes);
    if (rows.rows <= grain)
      f(0, rows.rows);
    else
      torch::stable::parallel_for(0, rows.rows, grain, f);
  }
};

Tensor scalar_tensor(const Problem& problem, double value) {
  Tensor out = new_tensor(problem.logits.tensor, {}, problem.accumulate());
  if (problem.accumulate() == ScalarType::Double)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = float(value);
  return out;
}

double scalar_value(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 0, "synkern::row_loss_backward: expected a 0-d tensor");
  return x.scalar_type() == ScalarType::Double ? *static_cast<const double*>(x.const_data_ptr())
                                               : double(*static_cast<const float*>(x.const_data_ptr()));
}

// The per-row losses of a reduced loss, on the stack for a small batch: an allocation costs as much as 8 of its rows.
class Scratch {
 public:
  explicit Scratch(const Problem& problem) {
    if (problem.rows.rows > int64_t(sizeof small_ / sizeof *small_)) large_ = problem.new_vector();
  }
  void* data() { return large_.has_value() ? large_->mutable_data_ptr() : small_; }

 private:
  double small_[512];
  MaybeTensor large_;
};

std::tuple<Tensor, Tensor> row_loss(const Tensor& logits, const Tensor& target, MaybeTensor weight,
                                            MaybeTensor ratio, MaybeTensor class_weight, int64_t loss, double p0,
                                            double p1, double p2, double label_smoothing, double z_loss,
                                            int64_t ignore_index, int64_t reduction) {
  Problem problem(logits, target, weight, ratio, class_weight, nullptr,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  problem.check_targets();
  const double denominator = problem.denominator(reduction);
  if (Reduction(reduction) == Reduction::none) {
    Tensor losses = problem.new_vector();
    problem.forward(losses.mutable_data_ptr());
    return {losses, problem.statistics};
  }
  Scratch scratch(problem);
  problem.forward(scratch.data());
  const double sum = ordered_sum(scratch.data(), problem.rows.rows, problem.accumulate());
  return {scalar_tensor(problem, sum / denominator), problem.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_loss_and_gradient(const Tensor& logits, const Tensor& target,
                                                                 MaybeTensor weight, MaybeTensor ratio,
                                                                 MaybeTensor class_weight, int64_t loss, double p0,
                                                                 double p1, double p2, double label_smoothing,
                                                                 double z_loss, int64_t ignore_index,
                                                                 int64_t reduction) {
  Problem problem(logits, target, weight, ratio, class_weight, nullptr,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  problem.check_targets();
  STD_TORCH_CHECK(Reduction(reduction) != Reduction::none, "synkern::row_loss_and_gradient: the loss must be reduced");
  const double denominator = problem.denominator(reduction);
  Scratch scratch(problem);
  Tensor gradient = problem.new_matrix(), grad_weight = problem.new_grad_weight();
  void *losses = scratch.data(), *out = gradient.mutable_data_ptr(), *out_weight = problem.grad_weight_data(grad_weight);
  problem.for_rows([&](int64_t b, int64_t e) {
    row_kernels().forward_backward(problem.rows, 1.0 / denominator, losses, out, out_weight, b, e);
  });
  const double sum = ordered_sum(losses, problem.rows.rows, problem.accumulate());
  return {scalar_tensor(problem, sum / denominator), problem.statistics, gradient, grad_weight};
}

// gradient and grad_weight come from row_loss_and_gradient, for a cotangent of 1; afterwards they are for `grad`.
void row_loss_rescale(const Tensor& grad, const Tensor& gradient, const Tensor& grad_weight, const Tensor& logits,
                      const Tensor& target, MaybeTensor weight, MaybeTensor ratio, MaybeTensor class_weight,
                      const Tensor& statistics, int64_t loss, double p0, double p1, double p2, double label_smoothing,
                      double z_loss, int64_t ignore_index) {
  const double scale = scalar_value(grad);
  if (scale == 1.0) return;
  Problem problem(logits, target, weight, ratio, class_weight, &statistics,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  void *out = gradient.mutable_data_ptr(), *out_weight = problem.grad_weight_data(grad_weight);
  const int64_t n = problem.rows.classes;
  problem.for_rows([&](int64_t b, int64_t e) {
    // 16-bit gradients are made again: scaled, they would be rounded twice, and float16 may have underflown
    if (problem.rows.dtype == DType::float32)
      row_kernels().scale_float32(out, scale, b * n, e * n);
    else
      row_kernels().backward(problem.rows, nullptr, scale, out, out_weight, b, e);
  });
  if (problem.rows.dtype == DType::float32 && out_weight) row_kernels().scale_float32(out_weight, scale, 0, problem.rows.rows);
}

std::tuple<Tensor, Tensor> row_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                             MaybeTensor weight, MaybeTensor ratio, MaybeTensor class_weight,
                                             const Tensor& statistics, int64_t loss, double p0, double p1, double p2,
                                             double label_smoothing, double z_loss, int64_t ignore_index,
                                             int64_t reduction) {
  Problem problem(logits, target, weight, ratio, class_weight, &statistics,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const bool reduced = Reduction(reduction) != Reduction::none;
  const double scale = reduced ? scalar_value(grad) : 1.0;
  MaybeTensor row_grad;
  if (!reduced) row_grad = vector(grad, "grad", problem.rows.rows, problem.accumulate());
  Tensor gradient = problem.new_matrix();
  Tensor grad_weight = problem.new_grad_weight();
  void *out = gradient.mutable_data_ptr(), *out_weight = problem.grad_weight_data(grad_weight);
  problem.for_rows([&](int64_t b, int64_t e) {
    row_kernels().backward(problem.rows, data_of(row_grad), scale, out, out_weight, b, e);
  });
  return {gradient, grad_weight};
}

Tensor row_loss_tangent(const Tensor& v, MaybeTensor coefficient, const Tensor& logits, const Tensor& target,
                        MaybeTensor ratio, MaybeTensor class_weight, const Tensor& statistics, int64_t loss, double p0,
                        double p1, double p2, double label_smoothing, double z_loss, int64_t ignore_index) {
  Problem problem(logits, target, std::nullopt, ratio, class_weight, &statistics,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const Matrix direction = problem.direction(v);
  const MaybeTensor k = vector(coefficient, "coefficient", problem.rows.rows, problem.accumulate());
  Tensor result = problem.new_vector();
  void* out = result.mutable_data_ptr();
  const void* v_data = direction.tensor.const_data_ptr();
  problem.for_rows([&](int64_t b, int64_t e) {
    row_kernels().tangent(problem.rows, v_data, direction.stride, data_of(k), out, b, e);
  });
  return result;
}

std::tuple<Tensor, Tensor> row_loss_hvp(const Tensor& v, const Tensor& coefficient, MaybeTensor extra,
                                        const Tensor& logits, const Tensor& target, MaybeTensor ratio,
                                        MaybeTensor class_weight, const Tensor& statistics, int64_t loss, double p0,
                                        double p1, double p2, double label_smoothing, double z_loss,
                                        int64_t ignore_index) {
  Problem problem(logits, target, std::nullopt, ratio, class_weight, &statistics,
                  {loss, p0, p1, p2, label_smoothing, z_loss, ignore_index});
  const Matrix direction = problem.direction(v);
  const Tensor k = vector(coefficient, "coefficient", problem.rows.rows, problem.accumulate());
  const MaybeTensor e = vector(extra, "extra", problem.rows.rows, problem.accumulate());
  Tensor result = problem.new_matrix(), directional = problem.new_vector();
  void *out = result.mutable_data_ptr(), *along = directional.mutable_data_ptr();
  const void *v_data = direction.tensor.const_data_ptr(), *k_data = k.const_data_ptr();
  problem.for_rows([&](int64_t begin, int64_t end) {
    row_kernels().hvp(problem.rows, v_data, direction.stride, k_data, data_of(e), out, along, begin, end);
  });
  return {result, directional};
}

}  // namespace
}  // namespace synkern

namespace {
void empty_cache() { synkern::empty_output_cache(); }
}  // namespace

#define SYNKERN_OPTIONS \
  "int loss, float p0, float p1, float p2, float label_smoothing, float z_loss, int ignore_index"

STABLE_TORCH_LIBRARY(synkern, m) {
  m.def("row_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? ratio, Tensor? class_weight, " SYNKERN_OPTIONS
        ", int reduction) -> (Tensor loss, Tensor statistics)");
  m.def("empty_cache() -> ()");
  m.def("row_loss_and_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor? ratio, Tensor? class_weight, "
        SYNKERN_OPTIONS ", int reduction) -> (Tensor loss, Tensor statistics, Tensor grad_logits, Tensor grad_weight)");
  m.def("row_loss_rescale(Tensor grad, Tensor(a!) grad_logits, Tensor(b!) grad_weight, Tensor logits, Tensor target, "
        "Tensor? weight, Tensor? ratio, Tensor? class_weight, Tensor statistics, " SYNKERN_OPTIONS ") -> ()");
  m.def("row_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor? ratio, "
        "Tensor? class_weight, Tensor statistics, " SYNKERN_OPTIONS
        ", int reduction) -> (Tensor grad_logits, Tensor grad_weight)");
  m.def("row_loss_tangent(Tensor v, Tensor? coefficient, Tensor logits, Tensor target, Tensor? ratio, "
        "Tensor? class_weight, Tensor statistics, " SYNKERN_OPTIONS ") -> Tensor");
  m.def("row_loss_hvp(Tensor v, Tensor coefficient, Tensor? extra, Tensor logits, Tensor target, Tensor? ratio, "
        "Tensor? class_weight, Tensor statistics, " SYNKERN_OPTIONS ") -> (Tensor hvp, Tensor directional)");
}

STABLE_TORCH_LIBRARY_IMPL(synkern, CompositeExplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

STABLE_TORCH_LIBRARY_IMPL(synkern, CPU, m) {
  m.impl("row_loss", TORCH_BOX(&synkern::row_loss));
  m.impl("row_loss_and_gradient", TORCH_BOX(&synkern::row_loss_and_gradient));
  m.impl("row_loss_rescale", TORCH_BOX(&synkern::row_loss_rescale));
  m.impl("row_loss_backward", TORCH_BOX(&synkern::row_loss_backward));
  m.impl("row_loss_tangent", TORCH_BOX(&synkern::row_loss_tangent));
  m.impl("row_loss_hvp", TORCH_BOX(&synkern::row_loss_hvp));
}
