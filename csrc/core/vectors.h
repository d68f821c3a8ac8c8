// Vectors of the instruction set that the file is compiled for, and the exponential. In an unnamed namespace: a merged
// copy of an inline function would run one instruction set's code on a machine that has another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace synkern {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
};
template <typename A>
constexpr int64_t lanes = vector_bytes / int64_t(sizeof(A));

using Floats = Vector<float>::type;
typedef uint32_t Bits __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));

// The same bits as another type: between numbers, and between vectors, where a cast is that.
template <typename To, typename From>
inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as() changes no size");
  if constexpr (sizeof(To) == vector_bytes) {
    return (To)x;
  } else {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
  }
}

// 16-bit floats from the bits in the low halves of U; F and U are numbers or vectors. Branch-free: the multiplication
// rebiases the exponent, which also makes subnormals right; then infinities and NaN are restored.
template <typename F, typename U>
inline F widen_bfloat16(U bits) {
  return as<F>(bits << 16);
}
template <typename F, typename U>
inline F widen_float16(U bits) {
  const U sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const F scaled = as<F>(magnitude) * 0x1p112f;
  const U is_special = U(magnitude >= (0x7c00u << 13));  // 1 in a number, all bits in a vector
  return as<F>(as<U>(scaled) | ((U{} - (is_special & 1u)) & 0x7f800000u) | sign);
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return widen_bfloat16<float>(uint32_t(x.bits)); }
inline float load(float16 x) { return widen_float16<float>(uint32_t(x.bits)); }

// Through pointers: a memcpy of a vector goes by way of the stack.
inline Floats load_vector(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store_vector(Floats x, float* to) { *reinterpret_cast<Floats*>(to) = x; }
template <typename T>
inline Bits load_shorts(const T* from) {
  return __builtin_convertvector(*reinterpret_cast<const Shorts*>(from), Bits);
}
inline Floats load_vector(const bfloat16* from) { return widen_bfloat16<Floats>(load_shorts(from)); }
inline Floats load_vector(const float16* from) { return widen_float16<Floats>(load_shorts(from)); }

// n < lanes elements, and `rest` behind them
template <typename T>
inline Floats load_vector(const T* from, int64_t n, float rest) {
  float padded[lanes<float>];
  for (int64_t j = 0; j < lanes<float>; ++j) padded[j] = j < n ? load(from[j]) : rest;
  return load_vector(padded);
}

// All bits in the last n lanes
inline Bits last_lanes(int64_t n) {
  static constexpr struct Steps {
    uint32_t bits[2 * lanes<float>] = {};
    constexpr Steps() {
      for (int64_t j = lanes<float>; j < 2 * lanes<float>; ++j) bits[j] = ~0u;
    }
  } steps;
  return *reinterpret_cast<const Bits*>(steps.bits + n);
}

// e^x for x <= 0 (a row minus its maximum), relative error 1e-7, in 13 instructions: the loops over a row are bound by
// them. Zero from -127 log 2 down, where the exponent would leave its bits. Undefined for NaN: rows that hold one are found
// with the maximum and get NaN statistics.
template <typename U, typename F>
inline F exp_nonpositive_of(F x) {
  constexpr float lowest = -88.0296919f, log2_e = 1.44269504f, log_2 = 0.693147182f;
  constexpr float to_integer = 12582912.f;  // 1.5 * 2^23: the addition leaves the integer in the low bits
  const F shifted = x * log2_e + to_integer;
  const F r = x - (shifted - to_integer) * log_2;
  F y = 1.3813136611133814e-3f * r + 8.36941972374916e-3f;  // minimax on |r| <= log(2) / 2, relative error 3e-9
  y = y * r + 4.166845604777336e-2f;
  y = y * r + 1.6666515171527863e-1f;
  y = y * r + 4.999999403953552e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  const F power = as<F>(as<U>(y) + (as<U>(shifted) << 23));
  return x > lowest ? power : F{};
}
inline float exp_nonpositive(float x) { return exp_nonpositive_of<uint32_t>(x); }
inline Floats exp_nonpositive(Floats x) { return exp_nonpositive_of<Bits>(x); }
inline double exp_nonpositive(double x) { return std::exp(x); }

// One number from a vector's lanes: halves meet until one is left. `omp simd reduction` ends with a loop over the lanes in
// memory: with it, and with tails of their own, the statistics of a row of 14 classes took 55 ns, and take 17.
template <typename F, typename Vector, typename Op>
inline F reduce(Vector x, Op op) {
  if constexpr (sizeof(Vector) <= 4 * sizeof(F)) {
    static_assert(sizeof(Vector) == 4 * sizeof(F), "vectors have 4, 8 or 16 lanes");
    return op(op(F(x[0]), F(x[2])), op(F(x[1]), F(x[3])));
  } else {
    typedef F Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return reduce<F>(op(low, high), op);
  }
}

}  // namespace
}  // namespace synkern
