// The loops over one row's classes, compiled once per instruction set. Everything is in an unnamed namespace: a
// merged copy of an inline function would run one instruction set's code on a machine that has another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/dtype.h"
#include "losses/row_terms.h"

namespace synkern {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
// Branch-free, so that loops over it vectorise: rebias the exponent by a multiplication, which also makes subnormals
// right, then restore infinities and NaN.
inline float load(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

inline void store(float x, float* to) { *to = x; }
inline void store(double x, double* to) { *to = x; }
// A NaN stays one as long as the low half of its payload is empty, which 16-bit inputs and canonical() (for what comes
// from float32 operands) see to.
inline void store(float x, bfloat16* to) {
  const uint32_t bits = float_to_bits(x);
  to->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// Round to nearest even by an addition that moves the cut to the bottom of the mantissa.
inline void store(float x, float16* to) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u) : result;
  to->bits = uint16_t(sign | result);
}

// e^x for x <= 0 (a row minus its maximum), relative error 1e-7, in 13 instructions: the loops below are bound by them.
// x is clamped at -127 log 2, where the exponent addition gives exactly zero. Undefined for NaN: rows that hold one are
// found with the maximum and get NaN statistics.
inline float exp_nonpositive(float x) {
  constexpr float lowest = -88.0296919f, log2_e = 1.44269504f, log_2 = 0.693147182f;
  constexpr float to_integer = 12582912.f;  // 1.5 * 2^23: the addition leaves the integer in the low bits
  const float clamped = lowest > x ? lowest : x;
  const float shifted = clamped * log2_e + to_integer;
  const float r = clamped - (shifted - to_integer) * log_2;
  float y = 1.3813136611133814e-3f;  // minimax on |r| <= log(2) / 2, relative error 3e-9
  y = y * r + 8.36941972374916e-3f;
  y = y * r + 4.166845604777336e-2f;
  y = y * r + 1.6666515171527863e-1f;
  y = y * r + 4.999999403953552e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  return bits_to_float(float_to_bits(y) + (float_to_bits(shifted) << 23));
}
inline double exp_nonpositive(double x) { return std::exp(x); }

// 16 KB of float32: the block is still in the first-level cache for its second pass.
constexpr int64_t block_classes = 4096;
constexpr double infinity = std::numeric_limits<double>::infinity();

template <typename T>
struct BlockMax {
  acc_t<T> max;
  bool nan;
};

template <typename T>
BlockMax<T> block_max(const T* z, int64_t n) {
  acc_t<T> m = -acc_t<T>(infinity);
  int nan = 0;
#pragma omp simd reduction(max : m) reduction(| : nan)
  for (int64_t j = 0; j < n; ++j) {
    const acc_t<T> x = load(z[j]);
    m = x > m ? x : m;
    nan |= x != x;
  }
  return {m, nan != 0};
}

// Keeps the exponentials of a row for its gradient, or nothing.
struct Discard {
  template <typename A>
  void operator()(int64_t, A) const {}
};
template <typename A>
struct Keep {
  A* out;
  void operator()(int64_t j, A e) const { out[j] = e; }
};

template <typename T, typename Sink>
double sum_exp_whole(const T* z, int64_t n, acc_t<T> max, Sink sink) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const acc_t<T> e = exp_nonpositive(acc_t<T>(load(z[j])) - max);
    sum += e;
    sink(j, e);
  }
  return sum;
}

// The same without the maxima themselves, which are counted: their sum is a 1 that would swallow small terms.
template <typename T, typename Sink>
double sum_exp_below_whole(const T* z, int64_t n, acc_t<T> max, int64_t& maxima, Sink sink) {
  acc_t<T> sum = 0;
  int count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t j = 0; j < n; ++j) {
    const acc_t<T> x = load(z[j]), e = exp_nonpositive(x - max);
    sum += x == max ? acc_t<T>(0) : e;
    count += x == max;
    sink(j, e);
  }
  maxima += count;
  return sum;
}

// The last elements of a row, padded to whole vectors: one by one, their exponentials took a third of a row of 100.
template <typename T>
struct Tail {
  using A = acc_t<T>;
  static constexpr int64_t lanes = 64 / int64_t(sizeof(A));
  A z[lanes], e[lanes];
  int64_t start, n;
  Tail(const T* row, int64_t row_length) : start(row_length / lanes * lanes), n(row_length - start) {
    for (int64_t j = 0; j < lanes; ++j) z[j] = -A(infinity);
    for (int64_t j = 0; j < n; ++j) z[j] = load(row[start + j]);
  }
  template <typename Sink>
  void give(Sink sink) const {
    for (int64_t j = 0; j < n; ++j) sink(start + j, e[j]);
  }
};

template <typename T, typename Sink>
double sum_exp(const T* z, int64_t n, acc_t<T> max, Sink sink) {
  Tail<T> tail(z, n);
  double sum = sum_exp_whole(z, tail.start, max, sink);
  if (tail.n == 0) return sum;
  sum += sum_exp_whole(tail.z, tail.lanes, max, Keep<acc_t<T>>{tail.e});
  tail.give(sink);
  return sum;
}

template <typename T, typename Sink>
double sum_exp_below(const T* z, int64_t n, acc_t<T> max, int64_t& maxima, Sink sink) {
  Tail<T> tail(z, n);
  maxima = 0;
  double sum = sum_exp_below_whole(z, tail.start, max, maxima, sink);
  if (tail.n == 0) return sum;
  sum += sum_exp_below_whole(tail.z, tail.lanes, max, maxima, Keep<acc_t<T>>{tail.e});
  tail.give(sink);
  return sum;
}

// One read of the row from memory: each block's maximum, then its exponentials while it is in cache. sink_at(block,
// start, m) is told the maximum m that the block's exponentials are taken from, and gives their sink.
template <typename T, typename SinkAt>
RowStatistics row_statistics(const T* z, int64_t classes, SinkAt sink_at) {
  using A = acc_t<T>;
  A m = -A(infinity);
  double rest = 0;
  bool nan = false;
  for (int64_t start = 0; start < classes; start += block_classes) {
    const int64_t n = classes - start < block_classes ? classes - start : block_classes;
    const BlockMax<T> block = block_max(z + start, n);
    nan |= block.nan;
    const bool raised = block.max > m;
    if (raised && m > -A(infinity)) rest = (rest + 1) * std::exp(double(m) - double(block.max));
    if (raised) m = block.max;
    const auto sink = sink_at(start / block_classes, start, m);
    if (raised) {
      int64_t maxima = 0;
      rest += sum_exp_below(z + start, n, m, maxima, sink);
      rest += double(maxima - 1);
    } else if (m > -A(infinity)) {  // else all is -inf so far, and -inf - -inf is NaN
      rest += sum_exp(z + start, n, m, sink);
    } else {
      for (int64_t j = 0; j < n; ++j) sink(j, A(0));
    }
  }
  if (nan || !(std::fabs(double(m)) < infinity)) rest = std::numeric_limits<double>::quiet_NaN();
  return {double(m), rest, 0};
}

template <typename T>
RowStatistics row_statistics(const T* z, int64_t classes) {
  return row_statistics(z, classes, [](int64_t, int64_t, acc_t<T>) { return Discard{}; });
}

template <typename T>
double weighted_sum(const T* z, const acc_t<T>* class_weight, int64_t n, acc_t<T> origin) {
  using A = acc_t<T>;
  A sum = 0;
  if (class_weight) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += class_weight[j] * (load(z[j]) - origin);
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += load(z[j]) - origin;
  }
  return sum;
}

// Sum over classes of class_weight (z - max), for label smoothing.
template <typename T>
double centered_sum(const T* z, const acc_t<T>* class_weight, int64_t classes, acc_t<T> max) {
  double sum = 0;
  for (int64_t start = 0; start < classes; start += block_classes) {
    const int64_t n = classes - start < block_classes ? classes - start : block_classes;
    sum += weighted_sum(z + start, class_weight ? class_weight + start : nullptr, n, max);
  }
  return sum;
}

// <e^(z - max), v>
template <typename T>
double exp_dot(const T* z, const T* v, int64_t classes, acc_t<T> max) {
  using A = acc_t<T>;
  double sum = 0;
  for (int64_t start = 0; start < classes; start += block_classes) {
    const int64_t end = start + block_classes < classes ? start + block_classes : classes;
    A block = 0;
#pragma omp simd reduction(+ : block)
    for (int64_t j = start; j < end; ++j) block += exp_nonpositive(acc_t<T>(load(z[j])) - max) * load(v[j]);
    sum += block;
  }
  return sum;
}

// out = alpha e^(z - max)
template <typename T>
void write_gradient(const T* z, int64_t classes, acc_t<T> max, acc_t<T> alpha, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) store(alpha * exp_nonpositive(acc_t<T>(load(z[j])) - max), out + j);
}

// out = alpha e^(z - max) + kappa class_weight
template <typename T>
void write_smoothed_gradient(const T* z, int64_t classes, acc_t<T> max, acc_t<T> alpha, acc_t<T> kappa,
                             const acc_t<T>* class_weight, T* out) {
  if (!class_weight) {
#pragma omp simd
    for (int64_t j = 0; j < classes; ++j) store(alpha * exp_nonpositive(acc_t<T>(load(z[j])) - max) + kappa, out + j);
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j)
    store(canonical(alpha * exp_nonpositive(acc_t<T>(load(z[j])) - max) + kappa * class_weight[j]), out + j);
}

// out = alpha e + kappa class_weight (1 where null), over a row's exponentials e; out may be e
template <typename T>
void scale_exponentials(const acc_t<T>* e, T* out, int64_t n, acc_t<T> alpha, acc_t<T> kappa,
                        const acc_t<T>* class_weight) {
  if (kappa == acc_t<T>(0)) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(alpha * e[j], out + j);
  } else if (!class_weight) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(alpha * e[j] + kappa, out + j);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(canonical(alpha * e[j] + kappa * class_weight[j]), out + j);
  }
}

// out = e^(z - max) (alpha + beta v) + kappa class_weight (1 where null)
template <typename T>
void write_hvp(const T* z, const T* v, int64_t classes, acc_t<T> max, acc_t<T> alpha, acc_t<T> beta, acc_t<T> kappa,
               const acc_t<T>* class_weight, T* out) {
  if (!class_weight) {
#pragma omp simd
    for (int64_t j = 0; j < classes; ++j)
      store(exp_nonpositive(acc_t<T>(load(z[j])) - max) * (alpha + beta * load(v[j])) + kappa, out + j);
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j)
    store(canonical(exp_nonpositive(acc_t<T>(load(z[j])) - max) * (alpha + beta * load(v[j])) + kappa * class_weight[j]), out + j);
}

// out = p (alpha + beta p), p = e^(z - max) inverse_sum
template <typename T>
void write_hessian_diagonal(const T* z, int64_t classes, acc_t<T> max, acc_t<T> inverse_sum, acc_t<T> alpha,
                            acc_t<T> beta, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) {
    const acc_t<T> p = exp_nonpositive(acc_t<T>(load(z[j])) - max) * inverse_sum;
    store(p * (alpha + beta * p), out + j);
  }
}

}  // namespace
}  // namespace synkern
