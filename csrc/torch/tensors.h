// What the operators share: element types, allocation, and operands checked and laid out for the kernels.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "core/dtype.h"

namespace synkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x, const char* what) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "synkern: ", what, " must be float32, float64, bfloat16 or float16");
  }
  return DType::float32;
}

inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// torch::stable::new_empty looks its operator up by name at every call, which is most of a small batch's time; the C
// function beneath allocates at once.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1] > 0 ? sizes.begin()[1] : 1;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A matrix whose rows have unit inner stride is read where it lies; any other layout is copied once.
struct Matrix {
  Tensor tensor;
  int64_t stride;
};

inline Matrix matrix(const Tensor& x) {
  const bool in_place = x.size(1) <= 1 || x.stride(1) == 1;
  Tensor rows = in_place ? x : torch::stable::contiguous(x);
  const int64_t stride = rows.stride(0);
  return {std::move(rows), stride};
}

// Saves a dispatcher call, of which a small batch has few to spare.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A vector operand: checked, contiguous, in the accumulation type.
inline Tensor vector(const Tensor& x, const char* name, int64_t size, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, "synkern: ", name, " must have shape (", size, ",)");
  STD_TORCH_CHECK(x.scalar_type() == type, "synkern: ", name,
                  " must be float64 beside float64 and float32 otherwise");
  return as_contiguous(x);
}

inline MaybeTensor vector(const MaybeTensor& x, const char* name, int64_t size, ScalarType type) {
  return x.has_value() ? MaybeTensor(vector(*x, name, size, type)) : std::nullopt;
}

inline const void* data_of(const MaybeTensor& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

}  // namespace synkern
