// Exact-size buffers, element types and the count of failures, shared by the checks under the sanitizers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "core/dtype.h"

namespace synkern {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr int most_reported = 20;

inline int64_t problems = 0, failures = 0;

inline void expect(bool holds, const std::string& where, const char* what) {
  if (holds) return;
  if (++failures <= most_reported) std::fprintf(stderr, "FAILED %s: %s\n", where.c_str(), what);
}

// An allocation of its own and of the exact size, so that one element too far is an error.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size, int poison = 0) : size_(size), data_(new T[size_t(size)]) {
    std::memset(static_cast<void*>(data_.get()), poison, bytes());
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[size_t(i)]; }
  bool same_bits(const Array& other) const { return !std::memcmp(data(), other.data(), bytes()); }

 private:
  size_t bytes() const { return size_t(size_) * sizeof(T); }
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// ---- Element types, encoded here without the kernels' own conversions --------------------------------------------

struct Float32 {
  using Storage = float;
  using Wide = float;
  static constexpr DType dtype = DType::float32;
  static constexpr const char* name = "float32";
  static constexpr double relative = 4e-6, absolute = 1e-30;
  static Storage encode(double x) { return float(x); }
  static double decode(Storage x) { return x; }
};

struct Float64 {
  using Storage = double;
  using Wide = double;
  static constexpr DType dtype = DType::float64;
  static constexpr const char* name = "float64";
  static constexpr double relative = 1e-12, absolute = 1e-300;
  static Storage encode(double x) { return x; }
  static double decode(Storage x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  using Wide = float;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double relative = 0x1p-7, absolute = 1e-30;
  static Storage encode(double x) {
    const float narrow = float(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return uint16_t(bits >> 16);
  }
  static double decode(Storage x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Wide = float;
  static constexpr DType dtype = DType::float16;
  static constexpr const char* name = "float16";
  static constexpr double relative = 0x1p-10, absolute = 0x1p-24;
  static Storage encode(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7e00;
    if (std::fabs(x) > 65504) return uint16_t(sign | 0x7c00);
    if (std::fabs(x) < 0x1p-14) return uint16_t(sign | uint16_t(std::fabs(x) * 0x1p24));
    int exponent;
    const double mantissa = std::frexp(std::fabs(x), &exponent);  // in [0.5, 1)
    return uint16_t(sign | uint16_t((exponent + 14) << 10) | uint16_t((mantissa * 2 - 1) * 1024));
  }
  static double decode(Storage x) {
    const int exponent = (x >> 10) & 31, mantissa = x & 1023;
    const double sign = x & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * inf;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }
};

}  // namespace synkern
