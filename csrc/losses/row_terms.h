// From a row's statistics to its loss and to the few numbers its derivatives are written with. Shared by every C++
// backend: the kernels differ in how they walk over classes, never in this.
#pragma once
#include "losses/losses.h"

namespace synkern {

// rest: sum of e^(z - max) without one occurrence of max; centered: sum cw (z - max), for label smoothing alone.
struct RowStatistics {
  double max, rest, centered;
};

// F = cw_y (1 - eps) f(t) + eps/C sum_c cw_c (lse - z_c) + z_loss lse^2 has the gradient
// slope_t (e_y - p) + slope_lse p + kappa cw.
struct RowContext {
  int64_t target;
  double max, inverse_sum, t, not_p, value;  // not_p = 1 - p_y, kept apart: 1 - (1 - tiny) loses it
  double slope_t, curvature_t, slope_lse, curvature_lse, kappa, ratio, class_weight;
  bool kept, flat;  // flat: F is constant near this row, so that its derivatives are exactly zero
};

// The number, or the quiet NaN without a payload.
template <typename A>
SYNKERN_INLINE A canonical(A x) {
  return x == x ? x : A(NAN);
}

// log1p takes three times as long as log, and its digits are wanted only beside a tiny x: in float32 below 1e-5, where
// log(1 + x) is still right to 1e-11.
template <typename A>
SYNKERN_INLINE double log_one_plus(double x) {
  constexpr double tiny = sizeof(A) == sizeof(double) ? 0.5 : 1e-5;
  return x > tiny ? std::log(1.0 + x) : std::log1p(x);
}

// A is the accumulation type; class_weight is the target's, class_weight_sum that of all classes (their number where
// there are none).
template <typename A>
SYNKERN_INLINE RowContext row_context(const LossParameters& loss, int64_t classes, double class_weight_sum,
                                      int64_t target, double class_weight, double ratio, const RowStatistics& s,
                                      double z_y) {
  RowContext c{};
  c.kept = true;
  c.target = target;
  c.max = s.max;
  c.class_weight = class_weight;
  c.inverse_sum = 1.0 / (1.0 + s.rest);
  const double log_sum = log_one_plus<A>(s.rest);
  c.t = (z_y - s.max) - log_sum;
  // The row's only one: every loss has p from it. It takes 6 ns, all of a row of 14 classes 17.
  const bool at_max = z_y == s.max;
  const double e_y = at_max ? 1.0 : std::exp(z_y - s.max);
  // Without cancellation: the target is the maximum, or the maximum's own 1 is among the other terms.
  c.not_p = (at_max ? s.rest : 1.0 + s.rest - e_y) * c.inverse_sum;
  const Scalar<double> f = evaluate<double>(loss, {c.t, e_y * c.inverse_sum, c.not_p}, ratio);
  const double main = class_weight * (1.0 - loss.label_smoothing);
  c.value = main * f.value;
  c.slope_t = main * f.slope;
  c.curvature_t = main * f.curvature;
  c.ratio = f.ratio;
  if (class_weight == 0.0) c.value = c.slope_t = c.curvature_t = 0.0;
  // One class has nothing to smooth: cw - cw would leave its rounding under a fused multiply-add.
  if (loss.label_smoothing != 0.0 && classes > 1) {
    const double share = loss.label_smoothing / double(classes);
    c.value += share * (class_weight_sum * log_sum - s.centered);
    c.slope_lse = share * class_weight_sum;
    c.kappa = -share;
  }
  if (loss.z_loss != 0.0) {
    const double lse = s.max + log_sum;
    c.value += loss.z_loss * lse * lse;
    c.slope_lse += 2.0 * loss.z_loss * lse;
    c.curvature_lse = 2.0 * loss.z_loss;
  }
  c.flat = c.slope_t == 0.0 && c.curvature_t == 0.0 && c.slope_lse == 0.0 && c.curvature_lse == 0.0 && c.kappa == 0.0;
  return c;
}

// weight F, exactly zero where the weight is
SYNKERN_INLINE double weighted_value(const RowContext& c, double weight) { return weight == 0.0 ? 0.0 : weight * c.value; }

// coefficient dF/dlogits = alpha e^(z - max) + kappa cw, and at_target in the target's column, from 1 - p_y itself.
struct GradientTerms {
  double alpha, kappa, at_target;
};

SYNKERN_INLINE GradientTerms gradient_terms(const RowContext& c, double coefficient) {
  const double first = c.slope_t * c.not_p + c.slope_lse * (1.0 - c.not_p);
  return {coefficient * (c.slope_lse - c.slope_t) * c.inverse_sum, coefficient * c.kappa,
          coefficient * (first + c.kappa * c.class_weight)};
}

// <dF/dlogits, v>, given v_y, dot = <p, v> and weighted = sum cw v
SYNKERN_INLINE double directional_derivative(const RowContext& c, double v_y, double dot, double weighted) {
  return c.slope_t * (v_y - dot) + c.slope_lse * dot + c.kappa * weighted;
}

// k (d2F/dlogits2) v + extra dF/dlogits = e^(z - max) (alpha + beta v) + kappa cw, and at_target in the target's column.
struct HvpTerms {
  double alpha, beta, kappa, at_target;
};

SYNKERN_INLINE HvpTerms hvp_terms(const RowContext& c, double v_y, double dot, double k, double extra) {
  const double p = 1.0 - c.not_p, t_dot = v_y - dot, mix = k * (c.slope_lse - c.slope_t);
  const double alpha =
      k * (c.curvature_lse * dot - c.curvature_t * t_dot) - mix * dot + extra * (c.slope_lse - c.slope_t);
  const double second =
      c.curvature_t * t_dot * c.not_p + (c.curvature_lse * dot + (c.slope_lse - c.slope_t) * t_dot) * p;
  const double first = c.slope_t * c.not_p + c.slope_lse * p;
  const double kappa = extra * c.kappa;
  return {alpha * c.inverse_sum, mix * c.inverse_sum, kappa, k * second + extra * first + kappa * c.class_weight};
}

}  // namespace synkern
