// The operands of the contraction operators, checked and laid out for the kernels of any device.
#pragma once
#include "torch/tensors.h"

namespace synkern {

inline void check_rows(const Tensor& x, const char* name, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows, "synkern: ", name, " must have shape (", rows, ", ...)");
}

inline void check_same_type(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "synkern: ", name, " must have the dtype of b");
}

// The sample of each row, or none where rows are equal groups.
inline MaybeTensor sample_index(const MaybeTensor& sample, int64_t samples, int64_t rows) {
  if (sample.has_value()) {
    STD_TORCH_CHECK(sample->dim() == 1 && sample->size(0) == rows && sample->scalar_type() == ScalarType::Long,
                    "synkern: sample must be int64 of shape (", rows, ",)");
    return as_contiguous(*sample);
  }
  STD_TORCH_CHECK(samples > 0 ? rows % samples == 0 : rows == 0, "synkern: ", rows, " rows cannot be split into ",
                  samples, " equal samples; pass the sample of each row");
  return std::nullopt;
}

struct LinearOperands {
  Matrix a, b, v;
  MaybeTensor v_bias;
  int64_t rows, inputs, outputs;

  LinearOperands(const Tensor& a_, const Tensor& b_, const Tensor& v_, const MaybeTensor& v_bias_)
      : a((check(a_, b_, v_), matrix(a_))),
        b(matrix(b_)),
        v(matrix(v_)),
        v_bias(vector(v_bias_, "v_bias", b_.size(1), accumulate_type(b_))),
        rows(b_.size(0)),
        inputs(a_.size(1)),
        outputs(b_.size(1)) {}

 private:
  static void check(const Tensor& a, const Tensor& b, const Tensor& v) {
    check_rows(b, "b", b.size(0));
    check_rows(a, "a", b.size(0));
    check_same_type(a, "a", b);
    STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == b.size(1) && v.size(1) == a.size(1),
                    "synkern: v must have shape (outputs, inputs) = (", b.size(1), ", ", a.size(1), ")");
    STD_TORCH_CHECK(v.scalar_type() == b.scalar_type() || v.scalar_type() == accumulate_type(b),
                    "synkern: v must have the dtype of b, or float32");
  }
};

struct EmbeddingOperands {
  Tensor index;
  Matrix b, v;
  int64_t rows, width, entries;

  EmbeddingOperands(const Tensor& index_, const Tensor& b_, const Tensor& v_)
      : index((check(index_, b_, v_), as_contiguous(index_))),
        b(matrix(b_)),
        v(matrix(v_)),
        rows(b_.size(0)),
        width(b_.size(1)),
        entries(v_.size(0)) {}

 private:
  static void check(const Tensor& index, const Tensor& b, const Tensor& v) {
    check_rows(b, "b", b.size(0));
    check_same_type(v, "v", b);
    STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == b.size(0) && index.scalar_type() == ScalarType::Long,
                    "synkern: index must be int64 of shape (", b.size(0), ",)");
    STD_TORCH_CHECK(v.dim() == 2 && v.size(1) == b.size(1), "synkern: v must have shape (entries, ", b.size(1), ")");
  }
};

struct NormOperands {
  Matrix x, b;
  MaybeTensor mean, v_weight, v_bias;
  Tensor rstd;
  int64_t rows, width;

  NormOperands(const Tensor& x_, const Tensor& b_, const MaybeTensor& mean_, const Tensor& rstd_,
               const MaybeTensor& v_weight_, const MaybeTensor& v_bias_)
      : x((check(x_, b_), matrix(x_))),
        b(matrix(b_)),
        mean(vector(mean_, "mean", b_.size(0), accumulate_type(b_))),
        v_weight(vector(v_weight_, "v_weight", b_.size(1), accumulate_type(b_))),
        v_bias(vector(v_bias_, "v_bias", b_.size(1), accumulate_type(b_))),
        rstd(vector(rstd_, "rstd", b_.size(0), accumulate_type(b_))),
        rows(b_.size(0)),
        width(b_.size(1)) {}

 private:
  static void check(const Tensor& x, const Tensor& b) {
    check_rows(b, "b", b.size(0));
    check_rows(x, "x", b.size(0));
    check_same_type(x, "x", b);
    STD_TORCH_CHECK(x.size(1) == b.size(1), "synkern: x and b must have the same shape");
  }
};

}  // namespace synkern
