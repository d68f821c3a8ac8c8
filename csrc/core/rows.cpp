// The row kernels. Compiled once per instruction set (SYNKERN_ISA names it); dispatch.cpp picks one at run time.
#include "core/rows.h"

#include <cstdlib>

#include "core/isa.h"
#include "core/vector_loops.h"

namespace synkern {
namespace {

// Row i of the problem. F = cw_y (1 - eps) f(t) + eps/C sum_c cw_c (lse - z_c) + z_loss lse^2 has the gradient
// slope_t (e_y - p) + slope_lse p + kappa cw.
struct RowContext {
  int64_t target;
  double max, inverse_sum, t, not_p, value;  // not_p = 1 - p_y, kept apart: 1 - (1 - tiny) loses it
  double slope_t, curvature_t, slope_lse, curvature_lse, kappa, ratio;
  bool kept, flat;  // flat: F is constant near this row, so that its derivatives are exactly zero
};

template <typename T>
const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + stride * row;
}

template <typename A>
double at_or(const void* values, int64_t i, double otherwise) {
  return values ? double(static_cast<const A*>(values)[i]) : otherwise;
}

// cw_c at class c
template <typename A>
double class_weight_at(const Rows& r, int64_t c) {
  return at_or<A>(r.class_weight, c, 1.0);
}

// log1p takes three times as long as log, and its digits are wanted only beside a tiny x: in float32 below 1e-5, where
// log(1 + x) is still right to 1e-11.
template <typename A>
double log_one_plus(double x) {
  constexpr double tiny = sizeof(A) == sizeof(double) ? 0.5 : 1e-5;
  return x > tiny ? std::log(1.0 + x) : std::log1p(x);
}

template <typename T>
RowContext context(const Rows& r, int64_t i, const RowStatistics& s, int64_t target) {
  using A = acc_t<T>;
  RowContext c{};
  c.kept = true;
  c.target = target;
  c.max = s.max;
  c.inverse_sum = 1.0 / (1.0 + s.rest);
  const double log_sum = log_one_plus<A>(s.rest), z_y = load(row_of<T>(r.logits, r.logits_stride, i)[target]);
  c.t = (z_y - s.max) - log_sum;
  // Without cancellation: the target is the maximum, or the maximum's own 1 is among the other terms.
  c.not_p = (z_y == s.max ? s.rest : 1.0 + s.rest - std::exp(z_y - s.max)) * c.inverse_sum;
  const Scalar<double> f = evaluate<double>(r.loss, c.t, at_or<A>(r.ratio, i, 1.0));
  const double class_weight = class_weight_at<A>(r, target);
  const double main = class_weight * (1.0 - r.loss.label_smoothing);
  c.value = main * f.value;
  c.slope_t = main * f.slope;
  c.curvature_t = main * f.curvature;
  c.ratio = f.ratio;
  if (class_weight == 0.0) c.value = c.slope_t = c.curvature_t = 0.0;
  if (r.loss.label_smoothing != 0.0) {
    const double share = r.loss.label_smoothing / double(r.classes);
    c.value += share * (r.class_weight_sum * log_sum - s.centered);
    c.slope_lse = share * r.class_weight_sum;
    c.kappa = -share;
  }
  if (r.loss.z_loss != 0.0) {
    const double lse = s.max + log_sum;
    c.value += r.loss.z_loss * lse * lse;
    c.slope_lse += 2.0 * r.loss.z_loss * lse;
    c.curvature_lse = 2.0 * r.loss.z_loss;
  }
  c.flat = c.slope_t == 0.0 && c.curvature_t == 0.0 && c.slope_lse == 0.0 && c.curvature_lse == 0.0 && c.kappa == 0.0;
  return c;
}

// The context from the saved statistics; kept is false for an ignored row.
template <typename T>
RowContext saved_context(const Rows& r, int64_t i) {
  using A = acc_t<T>;
  const int64_t target = target_at(r, i);
  if (target == r.ignore_index) return RowContext{};
  const A* statistics = static_cast<const A*>(r.statistics) + i;
  return context<T>(r, i,
                    {double(statistics[stat_max * r.rows]), double(statistics[stat_rest * r.rows]),
                     double(statistics[stat_centered_logit * r.rows])},
                    target);
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  std::memset(static_cast<void*>(out), 0, size_t(n) * sizeof(T));
}

template <typename T>
void save(const Rows& r, int64_t i, const RowStatistics& s, const RowContext& c) {
  using A = acc_t<T>;
  A* statistics = static_cast<A*>(r.statistics) + i;
  statistics[stat_max * r.rows] = A(s.max);
  statistics[stat_rest * r.rows] = A(s.rest);
  statistics[stat_centered_logit * r.rows] = A(s.centered);
  statistics[stat_ratio * r.rows] = A(c.ratio);
}

// The context of a kept row, given its statistics but for what only label smoothing needs.
template <typename T>
RowContext fresh_context(const Rows& r, int64_t i, RowStatistics& s, int64_t target) {
  using A = acc_t<T>;
  if (r.loss.label_smoothing != 0.0)
    s.centered = centered_sum(row_of<T>(r.logits, r.logits_stride, i), static_cast<const A*>(r.class_weight),
                              r.classes, A(s.max));
  return context<T>(r, i, s, target);
}

template <typename T>
void forward(const Rows& r, void* loss_, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A* loss = static_cast<A*>(loss_);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = target_at(r, i);
    RowStatistics s{};
    RowContext c{};
    if (target != r.ignore_index) {
      s = row_statistics(row_of<T>(r.logits, r.logits_stride, i), r.classes);
      c = fresh_context<T>(r, i, s, target);
    }
    save<T>(r, i, s, c);
    const double weight = at_or<A>(r.weight, i, 1.0);
    loss[i] = weight == 0.0 ? A(0) : A(weight * c.value);
  }
}

// The gradient at the target's column, from 1 - p_y itself.
template <typename A>
A target_gradient(const Rows& r, const RowContext& c, double coefficient) {
  const double first = c.slope_t * c.not_p + c.slope_lse * (1.0 - c.not_p);
  return canonical(A(coefficient * (first + c.kappa * class_weight_at<A>(r, c.target))));
}

// out = coefficient dF/dlogits
template <typename T>
void write_row_gradient(const Rows& r, const RowContext& c, const T* z, double coefficient, T* out) {
  using A = acc_t<T>;
  if (!c.kept || c.flat || coefficient == 0.0) return fill_zero(out, r.classes);
  const A alpha = canonical(A(coefficient * (c.slope_lse - c.slope_t) * c.inverse_sum));
  const A kappa = canonical(A(coefficient * c.kappa));
  if (kappa == A(0))
    write_gradient(z, r.classes, A(c.max), alpha, out);
  else
    write_smoothed_gradient(z, r.classes, A(c.max), alpha, kappa, static_cast<const A*>(r.class_weight), out);
  store(target_gradient<A>(r, c, coefficient), out + c.target);
}

template <typename T>
void backward(const Rows& r, const void* grad, double scale, void* gradient, void* grad_weight_, int64_t begin,
              int64_t end) {
  using A = acc_t<T>;
  A* grad_weight = static_cast<A*>(grad_weight_);
  for (int64_t i = begin; i < end; ++i) {
    const RowContext c = saved_context<T>(r, i);
    const double scale_i =
        grad ? at_or<A>(grad, i, 0.0) : scale / at_or<A>(r.statistics, stat_denominator * r.rows + i, 1.0);
    if (grad_weight) grad_weight[i] = c.kept ? A(scale_i * c.value) : A(0);
    write_row_gradient(r, c, row_of<T>(r.logits, r.logits_stride, i), scale_i * at_or<A>(r.weight, i, 1.0),
                       static_cast<T*>(gradient) + i * r.classes);
  }
}

// More blocks than any vocabulary has; a longer row takes its exponentials twice.
constexpr int64_t most_blocks = 256;

// A row's statistics and gradient from one exponential an element: taken from the maximum so far, kept in `e`, and
// scaled to the final maximum once the loss is known. e is the output itself where that has the accumulation type, and
// one row of scratch for 16-bit outputs, which would be rounded twice.
template <typename T>
RowContext forward_backward_row(const Rows& r, int64_t i, int64_t target, double scale, acc_t<T>* e, T* out) {
  using A = acc_t<T>;
  A maxima[most_blocks];
  const A* class_weight = static_cast<const A*>(r.class_weight);
  RowStatistics s = row_statistics(row_of<T>(r.logits, r.logits_stride, i), r.classes,
                                   [&](int64_t block, int64_t start, A m) {
                                     maxima[block] = m;
                                     return Keep<A>{e + start};
                                   });
  const RowContext c = fresh_context<T>(r, i, s, target);
  save<T>(r, i, s, c);
  const double coefficient = scale * at_or<A>(r.weight, i, 1.0);
  if (c.flat || coefficient == 0.0) {
    fill_zero(out, r.classes);
    return c;
  }
  const double alpha = coefficient * (c.slope_lse - c.slope_t) * c.inverse_sum, kappa = coefficient * c.kappa;
  for (int64_t start = 0; start < r.classes; start += block_classes) {
    const double shift = double(maxima[start / block_classes]) - s.max;
    scale_exponentials(e + start, out + start, r.classes - start < block_classes ? r.classes - start : block_classes,
                       canonical(A(shift == 0.0 ? alpha : alpha * std::exp(shift))), canonical(A(kappa)),
                       class_weight ? class_weight + start : nullptr);
  }
  store(target_gradient<A>(r, c, coefficient), out + target);
  return c;
}

template <typename T>
RowContext forward_backward_row(const Rows& r, int64_t i, int64_t target, double scale, T* out) {
  const T* z = row_of<T>(r.logits, r.logits_stride, i);
  RowStatistics s = row_statistics(z, r.classes);
  const RowContext c = fresh_context<T>(r, i, s, target);
  save<T>(r, i, s, c);
  write_row_gradient(r, c, z, scale * at_or<acc_t<T>>(r.weight, i, 1.0), out);
  return c;
}

// Where a row keeps its exponentials; null where it cannot.
template <typename T>
class Exponentials {
 public:
  using A = acc_t<T>;
  explicit Exponentials(int64_t classes) : possible_(classes <= most_blocks * block_classes) {
    if (possible_ && sizeof(T) != sizeof(A)) scratch_ = static_cast<A*>(std::malloc(size_t(classes) * sizeof(A)));
  }
  ~Exponentials() { std::free(scratch_); }
  Exponentials(const Exponentials&) = delete;
  Exponentials& operator=(const Exponentials&) = delete;
  A* for_output(T* out) const {
    if constexpr (sizeof(T) == sizeof(A))
      return possible_ ? out : nullptr;
    else
      return scratch_;
  }

 private:
  bool possible_;
  A* scratch_ = nullptr;
};

template <typename T>
void forward_backward(const Rows& r, double scale, void* loss_, void* gradient_, void* grad_weight_, int64_t begin,
                      int64_t end) {
  using A = acc_t<T>;
  A *loss = static_cast<A*>(loss_), *grad_weight = static_cast<A*>(grad_weight_);
  const Exponentials<T> exponentials(r.classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = target_at(r, i);
    T* out = static_cast<T*>(gradient_) + i * r.classes;
    RowContext c{};
    if (target == r.ignore_index) {
      save<T>(r, i, {}, c);
      fill_zero(out, r.classes);
    } else if (A* e = exponentials.for_output(out)) {
      c = forward_backward_row<T>(r, i, target, scale, e, out);
    } else {
      c = forward_backward_row<T>(r, i, target, scale, out);
    }
    const double weight = at_or<A>(r.weight, i, 1.0);
    loss[i] = weight == 0.0 ? A(0) : A(weight * c.value);
    if (grad_weight) grad_weight[i] = A(scale * c.value);
  }
}

struct Direction {
  double dot, weighted;  // <p, v>, sum cw v
};

template <typename T>
Direction direction(const Rows& r, const RowContext& c, const T* z, const T* v) {
  using A = acc_t<T>;
  Direction d{exp_dot(z, v, r.classes, A(c.max)) * c.inverse_sum, 0.0};
  if (c.kappa != 0.0) d.weighted = centered_sum(v, static_cast<const A*>(r.class_weight), r.classes, A(0));
  return d;
}

// <dF/dlogits, v>
template <typename T>
double directional_derivative(const RowContext& c, const Direction& d, const T* v) {
  return c.slope_t * (load(v[c.target]) - d.dot) + c.slope_lse * d.dot + c.kappa * d.weighted;
}

template <typename T>
void tangent(const Rows& r, const void* v_, int64_t v_stride, const void* coefficient, void* directional, int64_t begin,
             int64_t end) {
  using A = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const double k = at_or<A>(coefficient, i, 1.0);
    const RowContext c = saved_context<T>(r, i);
    double result = 0.0;
    if (c.kept && !c.flat && k != 0.0) {
      const T* v = row_of<T>(v_, v_stride, i);
      result = k * directional_derivative(c, direction(r, c, row_of<T>(r.logits, r.logits_stride, i), v), v);
    }
    static_cast<A*>(directional)[i] = A(result);
  }
}

// out = k H v + extra dF/dlogits
template <typename T>
void write_row_hvp(const Rows& r, const RowContext& c, const Direction& d, const T* z, const T* v, double k,
                   double extra, T* out) {
  using A = acc_t<T>;
  const double p = 1.0 - c.not_p, v_y = load(v[c.target]), t_dot = v_y - d.dot;
  const double mix = k * (c.slope_lse - c.slope_t);
  const double alpha = k * (c.curvature_lse * d.dot - c.curvature_t * t_dot) - mix * d.dot +
                       extra * (c.slope_lse - c.slope_t);
  const double kappa = extra * c.kappa;
  write_hvp(z, v, r.classes, A(c.max), canonical(A(alpha * c.inverse_sum)), canonical(A(mix * c.inverse_sum)),
            canonical(A(kappa)), static_cast<const A*>(r.class_weight), out);
  const double second = c.curvature_t * t_dot * c.not_p + (c.curvature_lse * d.dot + (c.slope_lse - c.slope_t) * t_dot) * p;
  const double first = c.slope_t * c.not_p + c.slope_lse * p;
  store(canonical(A(k * second + extra * first + kappa * class_weight_at<A>(r, c.target))), out + c.target);
}

template <typename T>
void hvp(const Rows& r, const void* v_, int64_t v_stride, const void* coefficient, const void* extra, void* out_,
         void* directional, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const double k = at_or<A>(coefficient, i, 1.0), e = at_or<A>(extra, i, 0.0);
    const RowContext c = saved_context<T>(r, i);
    T* out = static_cast<T*>(out_) + i * r.classes;
    double along = 0.0;
    if (!c.kept || c.flat) {
      fill_zero(out, r.classes);
    } else {
      const T *z = row_of<T>(r.logits, r.logits_stride, i), *v = row_of<T>(v_, v_stride, i);
      const Direction d = direction(r, c, z, v);
      along = directional_derivative(c, d, v);
      if (k == 0.0)
        write_row_gradient(r, c, z, e, out);
      else
        write_row_hvp(r, c, d, z, v, k, e, out);
    }
    static_cast<A*>(directional)[i] = A(along);
  }
}

template <typename T>
void hessian_diagonal(const Rows& r, void* out_, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const RowContext c = saved_context<T>(r, i);
    const double weight = at_or<A>(r.weight, i, 1.0), p = 1.0 - c.not_p, mix = c.slope_lse - c.slope_t;
    T* out = static_cast<T*>(out_) + i * r.classes;
    if (!c.kept || c.flat || weight == 0.0) {
      fill_zero(out, r.classes);
      continue;
    }
    write_hessian_diagonal(row_of<T>(r.logits, r.logits_stride, i), r.classes, A(c.max), A(c.inverse_sum),
                           canonical(A(weight * mix)), canonical(A(weight * (c.curvature_t + c.curvature_lse - mix))),
                           out);
    store(canonical(A(weight * (c.curvature_t * c.not_p * c.not_p + c.curvature_lse * p * p + mix * p * c.not_p))),
          out + c.target);
  }
}

void forward_any(const Rows& r, void* loss, int64_t b, int64_t e) { SYNKERN_BY_DTYPE(r.dtype, forward, r, loss, b, e) }
void backward_any(const Rows& r, const void* grad, double scale, void* gradient, void* grad_weight, int64_t b,
                  int64_t e) {
  SYNKERN_BY_DTYPE(r.dtype, backward, r, grad, scale, gradient, grad_weight, b, e)
}
void forward_backward_any(const Rows& r, double scale, void* loss, void* gradient, void* grad_weight, int64_t b,
                          int64_t e) {
  SYNKERN_BY_DTYPE(r.dtype, forward_backward, r, scale, loss, gradient, grad_weight, b, e)
}
void tangent_any(const Rows& r, const void* v, int64_t v_stride, const void* coefficient, void* directional, int64_t b,
                 int64_t e) {
  SYNKERN_BY_DTYPE(r.dtype, tangent, r, v, v_stride, coefficient, directional, b, e)
}
void hvp_any(const Rows& r, const void* v, int64_t v_stride, const void* coefficient, const void* extra, void* out,
             void* directional, int64_t b, int64_t e) {
  SYNKERN_BY_DTYPE(r.dtype, hvp, r, v, v_stride, coefficient, extra, out, directional, b, e)
}
void scale_float32(void* x, double scale, int64_t begin, int64_t end) {
  float* values = static_cast<float*>(x) + begin;
  scale_exponentials(values, values, end - begin, float(scale), 0.f, static_cast<const float*>(nullptr));
}
void hessian_diagonal_any(const Rows& r, void* out, int64_t b, int64_t e) {
  SYNKERN_BY_DTYPE(r.dtype, hessian_diagonal, r, out, b, e)
}

}  // namespace

extern const RowKernels SYNKERN_CONCAT(row_kernels_, SYNKERN_ISA);
const RowKernels SYNKERN_CONCAT(row_kernels_, SYNKERN_ISA) = {
    SYNKERN_STRING(SYNKERN_ISA), forward_any, backward_any, forward_backward_any, tangent_any, hvp_any,
    scale_float32, hessian_diagonal_any};

}  // namespace synkern
