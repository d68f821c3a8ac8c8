// The scalar maths of every loss: value, slope and curvature as functions of t = log softmax(logits)[target].
// Shared by every C++ backend; adding a loss starts here.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define SYNKERN_INLINE static __host__ __device__ __forceinline__
#else
// static, not inline: the header is compiled once per instruction set, and merged copies would run the wrong one.
#define SYNKERN_INLINE static inline
#endif

namespace synkern {

// Numbers are part of the operator schema: append, never reorder. synkern/registry.py holds the same list.
enum class LossKind : int64_t {
  cross_entropy = 0,
  rce = 1,    // p0 = log_zero; MAE is RCE with log_zero = -2
  gce = 2,    // p0 = q, p1 = truncation (0: none)
  sce = 3,    // p0 = alpha, p1 = beta, p2 = log_zero
  focal = 4,  // p0 = gamma, p1 = detach_modulation
  imp = 5,    // p0 = max_weight, p1 = ratio is a logarithm
  dimp = 6,   // p0 = max_weight, p1 = ratio is a logarithm, p2 = detach_weight
  count = 7,
};

struct LossParameters {
  LossKind kind;
  double p0, p1, p2;
  double label_smoothing, z_loss;  // terms in lse and the mean logit, added outside the scalar function
};

template <typename T>
struct Scalar {
  T value, slope, curvature;  // f, df/dt, d2f/dt2
  T ratio;                    // the row's IMP or DIMP weight, 1 for every other loss
};

// The target's, each with digits of its own: 1 - p beside p = 1, and p where e^t would be rounded with a large t.
template <typename T>
struct Probability {
  T t, p, not_p;  // log p, p, 1 - p
};

// f = -A (1 - p)
template <typename T>
SYNKERN_INLINE Scalar<T> reverse_cross_entropy(const Probability<T>& at, T log_zero) {
  return {-log_zero * at.not_p, log_zero * at.p, log_zero * at.p, T(1)};
}

// f = (1 - e^{qt}) / q, constant where p <= truncation; q = 0 is its limit, cross entropy
template <typename T>
SYNKERN_INLINE Scalar<T> generalized_cross_entropy(T t, T q, T truncation) {
  const bool truncated = truncation > T(0) && t <= std::log(truncation);
  const T at = truncated ? std::log(truncation) : t;
  if (q == T(0)) return {-at, truncated ? T(0) : T(-1), T(0), T(1)};
  const T power = truncated ? T(0) : std::exp(q * at);
  return {-std::expm1(q * at) / q, -power, -q * power, T(1)};
}

// x^y for x in [0, 1]
template <typename T>
SYNKERN_INLINE T power(T x, T y) {
#ifdef __CUDA_ARCH__
  return std::exp(y * std::log(x));  // off by y log(x) in ulp; pow is a call, around which registers are spilled
#else
  return std::pow(x, y);
#endif
}

// f = -(1 - p)^gamma t. With u = 1 - p, t / u stays finite as p -> 1 (its limit is -1) and p t as p -> 0, so the
// slope is written in those two: u^(gamma - 1) alone is infinite at t = 0 for gamma < 1.
template <typename T>
SYNKERN_INLINE Scalar<T> focal(const Probability<T>& at, T gamma, bool detach_modulation) {
  const T t = at.t, p = at.p, u = at.not_p;
  const T modulation = gamma == T(0) ? T(1) : power(u, gamma);
  const T value = modulation == T(0) ? T(0) : -modulation * t;
  if (detach_modulation || gamma == T(0)) return {value, -modulation, T(0), T(1)};
  const T pt = p == T(0) ? T(0) : p * t;
  const T pt_over_u = u == T(0) ? T(-1) : pt / u;
  const T slope = modulation * (gamma * pt_over_u - T(1));
  // For gamma < 1 the curvature is infinite at u = 0, but it only ever multiplies a factor u: the product's limit is 0.
  const T outer = u == T(0) ? (gamma == T(1) ? T(1) : T(0)) : modulation / u;
  const T curvature = gamma * outer * (pt + T(2) * p - (gamma - T(1)) * p * pt_over_u);
  return {value, slope, curvature, T(1)};
}

// f = -w t with w = quality / p capped; constant, or differentiated through p
template <typename T>
SYNKERN_INLINE Scalar<T> weighted_log_likelihood(T t, T weight, T max_weight, bool differentiate_weight) {
  const bool capped = weight > max_weight;
  if (capped) weight = max_weight;
  if (weight == T(0)) return {T(0), T(0), T(0), T(0)};  // exactly zero, also where t is -inf
  if (!differentiate_weight || capped) return {-weight * t, -weight, T(0), weight};
  return {-weight * t, weight * t - weight, weight * (T(2) - t), weight};
}

template <typename T>
SYNKERN_INLINE Scalar<T> evaluate(const LossParameters& loss, const Probability<T>& at, T ratio) {
  const T t = at.t, p0 = T(loss.p0), p1 = T(loss.p1), p2 = T(loss.p2);
  switch (loss.kind) {
    case LossKind::rce:
      return reverse_cross_entropy(at, p0);
    case LossKind::gce:
      return generalized_cross_entropy(t, p0, p1);
    case LossKind::sce: {
      const Scalar<T> r = reverse_cross_entropy(at, p2);
      return {p1 * r.value - p0 * t, p1 * r.slope - p0, p1 * r.curvature, T(1)};
    }
    case LossKind::focal:
      return focal(at, p0, p1 != T(0));
    case LossKind::imp:
      return weighted_log_likelihood(t, p1 != T(0) ? std::exp(ratio) : ratio, p0, false);
    case LossKind::dimp:
      // of logarithms one exponential of the difference: quality and 1/p may each leave the range where w does not
      return weighted_log_likelihood(t, p1 != T(0) ? std::exp(ratio - t) : (ratio == T(0) ? T(0) : ratio / at.p), p0,
                                     p2 == T(0));
    default:
      return {-t, T(-1), T(0), T(1)};
  }
}

}  // namespace synkern
