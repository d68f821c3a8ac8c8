// The operands of a row-loss operator, checked and laid out for the kernels of any device.
#pragma once
#include "core/rows.h"
#include "torch/tensors.h"

namespace synkern {

struct Options {
  int64_t loss;
  double p0, p1, p2, label_smoothing, z_loss;
  int64_t ignore_index;
};

inline IndexType index_type_of(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Long:
      return IndexType::int64;
    case ScalarType::Int:
      return IndexType::int32;
    case ScalarType::Short:
      return IndexType::int16;
    case ScalarType::Byte:
      return IndexType::uint8;
    default:
      STD_TORCH_CHECK(false, "synkern::row_loss: target must be int64, int32, int16 or uint8");
  }
  return IndexType::int64;
}

// Kept alive while the kernels hold pointers into them.
struct Operands {
  Matrix logits;
  Tensor target;
  MaybeTensor weight, ratio, class_weight;
  Tensor statistics;
  Rows rows;  // class_weight_sum is that of no class weights

  Operands(const Tensor& logits_, const Tensor& target_, const MaybeTensor& weight_, const MaybeTensor& ratio_,
           const MaybeTensor& class_weight_, const Tensor* statistics_, const Options& options)
      : logits((check_shapes(logits_, target_), matrix(logits_))),
        target(as_contiguous(target_)),
        weight(vector(weight_, "weight", logits_.size(0), accumulate_type(logits_))),
        ratio(vector(ratio_, "ratio", logits_.size(0), accumulate_type(logits_))),
        class_weight(vector(class_weight_, "class_weight", logits_.size(1), accumulate_type(logits_))),
        statistics(statistics_ ? as_contiguous(*statistics_)
                               : new_tensor(logits_, {int64_t(statistics_rows), logits_.size(0)},
                                            accumulate_type(logits_))) {
    STD_TORCH_CHECK(options.loss >= 0 && options.loss < int64_t(LossKind::count),
                    "synkern::row_loss: loss must be a LossKind, got ", options.loss);
    rows.logits = logits.tensor.const_data_ptr();
    rows.logits_stride = logits.stride;
    rows.dtype = dtype_of(logits.tensor, "logits");
    rows.target = target.const_data_ptr();
    rows.target_type = index_type_of(target);
    rows.rows = logits_.size(0);
    rows.classes = logits_.size(1);
    rows.ignore_index = options.ignore_index;
    rows.weight = data_of(weight);
    rows.ratio = data_of(ratio);
    rows.class_weight = data_of(class_weight);
    rows.class_weight_sum = double(rows.classes);
    rows.loss = {LossKind(options.loss), options.p0, options.p1, options.p2, options.label_smoothing, options.z_loss};
    rows.statistics = statistics.mutable_data_ptr();
  }

  static void check_shapes(const Tensor& logits, const Tensor& target) {
    STD_TORCH_CHECK(logits.dim() == 2 && target.dim() == 1 && target.size(0) == logits.size(0),
                    "synkern::row_loss: expected logits (N, C) and target (N,)");
  }

  ScalarType accumulate() const { return accumulate_type(logits.tensor); }

  Tensor new_vector() const { return new_tensor(logits.tensor, {rows.rows}, accumulate()); }

  // Empty where there is no weight.
  Tensor new_grad_weight() const {
    return new_tensor(logits.tensor, {weight.has_value() ? rows.rows : 0}, accumulate());
  }
  void* grad_weight_data(const Tensor& grad_weight) const {
    return weight.has_value() ? grad_weight.mutable_data_ptr() : nullptr;
  }

  Matrix direction(const Tensor& v) const {
    STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == rows.rows && v.size(1) == rows.classes &&
                        v.scalar_type() == logits.tensor.scalar_type(),
                    "synkern::row_loss: the direction must have the shape and dtype of logits");
    return matrix(v);
  }
};

}  // namespace synkern
