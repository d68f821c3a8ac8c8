// The row kernels. Compiled once per instruction set (SYNKERN_ISA names it); dispatch.cpp picks one at run time.
#include "core/rows.h"

#include <cstdlib>

#include "core/isa.h"
#include "core/vector_loops.h"
#include "losses/row_terms.h"

namespace synkern {
namespace {

template <typename T>
const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + stride * row;
}

// cw_c at class c
template <typename A>
double class_weight_at(const Rows& r, int64_t c) {
  return at_or<A>(r.class_weight, c, 1.0);
}

template <typename T>
RowContext context(const Rows& r, int64_t i, const RowStatistics& s, int64_t target) {
  using A = acc_t<T>;
  return row_context<A>(r.loss, r.classes, r.class_weight_sum, target, class_weight_at<A>(r, target),
                        at_or<A>(r.ratio, i, 1.0), s, load(row_of<T>(r.logits, r.logits_stride, i)[target]));
}

// The context from the saved statistics; kept is false for an ignored row.
template <typename T>
RowContext saved_context(const Rows& r, int64_t i) {
  using A = acc_t<T>;
  const int64_t target = target_at(r, i);
  if (target == r.ignore_index) return RowContext{};
  return context<T>(r, i, saved_statistics<A>(r, i), target);
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  std::memset(static_cast<void*>(out), 0, size_t(n) * sizeof(T));
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
    save_statistics<A>(r, i, s, c.ratio);
    loss[i] = A(weighted_value(c, at_or<A>(r.weight, i, 1.0)));
  }
}

// out = coefficient dF/dlogits
template <typename T>
void write_row_gradient(const Rows& r, const RowContext& c, const T* z, double coefficient, T* out) {
  using A = acc_t<T>;
  if (!c.kept || c.flat || coefficient == 0.0) return fill_zero(out, r.classes);
  const GradientTerms g = gradient_terms(c, coefficient);
  const A alpha = canonical(A(g.alpha)), kappa = canonical(A(g.kappa));
  if (kappa == A(0))
    write_gradient(z, r.classes, A(c.max), alpha, out);
  else
    write_smoothed_gradient(z, r.classes, A(c.max), alpha, kappa, static_cast<const A*>(r.class_weight), out);
  store(canonical(A(g.at_target)), out + c.target);
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
  save_statistics<A>(r, i, s, c.ratio);
  const double coefficient = scale * at_or<A>(r.weight, i, 1.0);
  if (c.flat || coefficient == 0.0) {
    fill_zero(out, r.classes);
    return c;
  }
  const GradientTerms g = gradient_terms(c, coefficient);
  for (int64_t start = 0; start < r.classes; start += block_classes) {
    const double shift = double(maxima[start / block_classes]) - s.max;
    scale_exponentials(e + start, out + start, r.classes - start < block_classes ? r.classes - start : block_classes,
                       canonical(A(shift == 0.0 ? g.alpha : g.alpha * std::exp(shift))), canonical(A(g.kappa)),
                       class_weight ? class_weight + start : nullptr);
  }
  store(canonical(A(g.at_target)), out + target);
  return c;
}

template <typename T>
RowContext forward_backward_row(const Rows& r, int64_t i, int64_t target, double scale, T* out) {
  const T* z = row_of<T>(r.logits, r.logits_stride, i);
  RowStatistics s = row_statistics(z, r.classes);
  const RowContext c = fresh_context<T>(r, i, s, target);
  save_statistics<acc_t<T>>(r, i, s, c.ratio);
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
      save_statistics<A>(r, i, {}, c.ratio);
      fill_zero(out, r.classes);
    } else if (A* e = exponentials.for_output(out)) {
      c = forward_backward_row<T>(r, i, target, scale, e, out);
    } else {
      c = forward_backward_row<T>(r, i, target, scale, out);
    }
    loss[i] = A(weighted_value(c, at_or<A>(r.weight, i, 1.0)));
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
      const Direction d = direction(r, c, row_of<T>(r.logits, r.logits_stride, i), v);
      result = k * directional_derivative(c, load(v[c.target]), d.dot, d.weighted);
    }
    static_cast<A*>(directional)[i] = A(result);
  }
}

// out = k H v + extra dF/dlogits
template <typename T>
void write_row_hvp(const Rows& r, const RowContext& c, const Direction& d, const T* z, const T* v, double k,
                   double extra, T* out) {
  using A = acc_t<T>;
  const HvpTerms h = hvp_terms(c, load(v[c.target]), d.dot, k, extra);
  write_hvp(z, v, r.classes, A(c.max), canonical(A(h.alpha)), canonical(A(h.beta)), canonical(A(h.kappa)),
            static_cast<const A*>(r.class_weight), out);
  store(canonical(A(h.at_target)), out + c.target);
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
      along = directional_derivative(c, load(v[c.target]), d.dot, d.weighted);
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
