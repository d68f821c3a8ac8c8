// The loops over one row's classes, compiled once per instruction set. In an unnamed namespace, as vectors.h is.
#pragma once
#include <limits>

#include "core/vectors.h"
#include "losses/row_terms.h"

namespace synkern {
namespace {

inline float bits_to_float(uint32_t bits) { return as<float>(bits); }
inline uint32_t float_to_bits(float x) { return as<uint32_t>(x); }

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
  Floats m = Floats{} - float(infinity);
  Bits nan{};
  const auto see = [&](Floats x) {
    m = x > m ? x : m;
    nan |= Bits(x != x);
  };
  int64_t j = 0;
  for (; j + lanes<float> <= n; j += lanes<float>) see(load_vector(z + j));
  if (n < lanes<float>)
    see(load_vector(z, n, -float(infinity)));
  else if (j < n)
    see(load_vector(z + n - lanes<float>));
  return {reduce<float>(m, [](auto x, auto y) { return x > y ? x : y; }),
          reduce<uint32_t>(nan, [](auto x, auto y) { return x | y; }) != 0};
}
template <>
BlockMax<double> block_max(const double* z, int64_t n) {
  double m = -infinity;
  bool nan = false;
  for (int64_t j = 0; j < n; ++j) {
    m = z[j] > m ? z[j] : m;
    nan |= z[j] != z[j];
  }
  return {m, nan};
}

// Keeps the exponentials of a row for its gradient, or nothing.
struct Discard {
  template <typename A>
  void operator()(int64_t, A) const {}
  void operator()(int64_t, Floats, int64_t) const {}
};
template <typename A>
struct Keep {
  A* out;
  void operator()(int64_t j, A e) const { out[j] = e; }
  void operator()(int64_t j, Floats e) const { store_vector(e, out + j); }
  void operator()(int64_t j, Floats e, int64_t n) const {
    for (int64_t k = 0; k < lanes<float>; ++k)
      if (k < n) out[j + k] = e[k];
  }
};

// Gives `take` a row's vectors with the lanes that count, and `sink` what comes back. The last vector of a row ends with
// it and begins in the one before; of a row that fills none the rest is -inf, whose exponential is 0. Inlined by force:
// called, it keeps the caller's sums in memory, and a vector takes 4.2 ns instead of 3.1.
template <typename T, typename Take, typename Sink>
__attribute__((always_inline)) inline void for_vectors(const T* z, int64_t n, const Take& take, const Sink& sink) {
  const Bits all = ~Bits{};
  if (n < lanes<float>) return sink(0, take(load_vector(z, n, -float(infinity)), all), n);
  int64_t j = 0;
  for (; j + lanes<float> <= n; j += lanes<float>) sink(j, take(load_vector(z + j), all));
  if (j < n) sink(n - lanes<float>, take(load_vector(z + n - lanes<float>), last_lanes(n - j)));
}

template <typename T, typename Sink>
double sum_exp(const T* z, int64_t n, acc_t<T> max, Sink sink) {
  if constexpr (sizeof(T) == sizeof(double)) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double e = exp_nonpositive(z[j] - max);
      sum += e;
      sink(j, e);
    }
    return sum;
  } else {
    Floats sum{};
    for_vectors(z, n, [&](Floats x, Bits counts) {
      const Floats e = exp_nonpositive(x - max);
      sum += as<Floats>(as<Bits>(e) & counts);
      return e;
    }, sink);
    return reduce<float>(sum, [](auto x, auto y) { return x + y; });
  }
}

// The same without the maxima themselves, which are counted: their sum is a 1 that would swallow small terms.
template <typename T, typename Sink>
double sum_exp_below(const T* z, int64_t n, acc_t<T> max, int64_t& maxima, Sink sink) {
  maxima = 0;
  if constexpr (sizeof(T) == sizeof(double)) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double e = exp_nonpositive(z[j] - max);
      sum += z[j] == max ? 0.0 : e;
      maxima += z[j] == max;
      sink(j, e);
    }
    return sum;
  } else {
    Floats sum{};
    Bits count{};
    for_vectors(z, n, [&](Floats x, Bits counts) {
      const Floats e = exp_nonpositive(x - max);
      const Bits at_max = Bits(x == max);  // all bits of such a lane, or -1
      sum += as<Floats>(as<Bits>(e) & ~at_max & counts);
      count -= at_max & counts;
      return e;
    }, sink);
    const auto add = [](auto x, auto y) { return x + y; };
    maxima = reduce<uint32_t>(count, add);
    return reduce<float>(sum, add);
  }
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
