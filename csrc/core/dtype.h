// Element types, and the type that sums over them are kept in.
#pragma once

namespace synkern {

enum class DType : int { float32, float64, bfloat16, float16 };

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

}  // namespace synkern
