// Runs every kernel under the address and undefined-behaviour sanitizers, on buffers of the exact size, and checks
// what must hold whatever the numbers are. SYNKERN_ISA chooses the instruction set; exit status 77 says that this
// processor has another one, 1 that a check failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/output_memory.h"
#include "core/rows.h"
#include "native/checking.h"
#include "native/sanitize_contraction.h"
#include "native/sanitize_lstm.h"

namespace {

using namespace synkern;

constexpr int exit_other_isa = 77;

template <typename T>
T all_bits_set() {
  T x;
  std::memset(&x, 0xff, sizeof x);
  return x;
}

// ---- What is run -------------------------------------------------------------------------------------------------

struct Loss {
  const char* name;
  LossKind kind;
  double p0, p1, p2;
  bool has_ratio() const { return kind == LossKind::imp || kind == LossKind::dimp; }
  bool ratio_is_log() const { return has_ratio() && p1 != 0; }
};

const Loss losses[] = {
    {"cross_entropy", LossKind::cross_entropy, 0, 0, 0},
    {"rce", LossKind::rce, -9.2, 0, 0},
    {"mae", LossKind::rce, -2, 0, 0},
    {"gce", LossKind::gce, 0.7, 0, 0},
    {"gce q=1", LossKind::gce, 1, 0, 0},
    {"gce q=0", LossKind::gce, 0, 0, 0},
    {"gce truncated", LossKind::gce, 0.7, 0.5, 0},
    {"sce", LossKind::sce, 0.1, 1, -9.2},
    {"focal", LossKind::focal, 2, 0, 0},
    {"focal gamma=0.5", LossKind::focal, 0.5, 0, 0},
    {"focal gamma=0", LossKind::focal, 0, 0, 0},
    {"focal detached", LossKind::focal, 2, 1, 0},
    {"imp", LossKind::imp, inf, 0, 0},
    {"imp capped, log", LossKind::imp, 1.2, 1, 0},
    {"dimp", LossKind::dimp, inf, 0, 1},
    {"dimp capped, log", LossKind::dimp, 1.5, 1, 1},
    {"dimp differentiated", LossKind::dimp, inf, 0, 0},
};

struct Setup {
  const char* name;
  bool weight, class_weight;
  double label_smoothing, z_loss;
  int64_t padding;  // elements between rows
  bool expanded, ignored_row, zero_weight;
  IndexType target_type;
};

const Setup setups[] = {
    {"plain", false, false, 0, 0, 0, false, false, false, IndexType::int64},
    {"weight, ignored row", true, false, 0, 0, 0, false, true, false, IndexType::int32},
    {"class weight, strided", false, true, 0, 0, 3, false, false, false, IndexType::int16},
    {"smoothing, class weight", true, true, 0.1, 0, 0, false, false, false, IndexType::uint8},
    {"smoothing", false, false, 0.3, 0, 1, false, false, false, IndexType::int64},
    {"z-loss, strided", false, false, 0, 1e-2, 1, false, false, false, IndexType::int64},
    {"everything", true, true, 0.2, 1e-2, 5, false, true, false, IndexType::int32},
    {"expanded row", true, false, 0, 0, 0, true, false, false, IndexType::int16},
    {"weight zero", true, false, 0, 0, 0, false, false, true, IndexType::uint8},
};

enum class Pattern {
  random, ascending, impossible_class, impossible_target, all_impossible, infinite, nan, nan_all_bits, all_nan,
  huge, count
};
const char* const pattern_names[] = {"random", "ascending", "impossible class", "impossible target", "all impossible",
                                     "infinite", "NaN", "NaN with all bits", "all NaN", "huge"};

bool is_ordinary(Pattern p) { return p == Pattern::random || p == Pattern::ascending; }

// Small, seeded, and the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  double uniform(double low, double high) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * double(state_ >> 11) * 0x1p-53;
  }
  int64_t below(int64_t n) { return std::min(n - 1, int64_t(uniform(0, double(n)))); }

 private:
  uint64_t state_;
};

int64_t index_width(IndexType type) {
  return type == IndexType::int64 ? 8 : type == IndexType::int32 ? 4 : type == IndexType::int16 ? 2 : 1;
}

template <typename E>
struct Problem {
  using T = typename E::Storage;
  using A = typename E::Wide;

  Problem(const Loss& loss_, const Setup& setup_, Pattern pattern_, int64_t n_, int64_t c_)
      : loss(loss_), setup(setup_), pattern(pattern_), n(n_), c(c_), type(type_for(setup_, c_)),
        stride(setup_.expanded ? 0 : c_ + setup_.padding), ignore_index(type == IndexType::uint8 ? 255 : -100),
        random(uint64_t(c_) * 31 + uint64_t(n_)), logits(n_ ? (n_ - 1) * stride + c_ : 0),
        target(n_ * index_width(type)), weight(n_), ratio(n_), class_weight(c_), v(n_ * c_), coefficient(n_),
        extra(n_), grad(n_) {
    for (int64_t i = 0; i < n; ++i) write_row(i);
    for (int64_t j = 0; j < c; ++j) class_weight[j] = A(random.uniform(0.3, 2));
  }

  static IndexType type_for(const Setup& setup, int64_t classes) {
    return setup.target_type == IndexType::uint8 && classes > 255 ? IndexType::int64 : setup.target_type;
  }

  // The pattern is in the middle row, with ordinary neighbours; in the only one; and in all where they are one.
  bool has_pattern(int64_t i) const { return n == 1 || setup.expanded || i == 1; }
  bool ignored(int64_t i) const { return setup.ignored_row && i == n - 1; }
  bool left_out(int64_t i) const { return ignored(i) || (setup.zero_weight && i == 0); }
  // A ratio by p without a cap leaves the range of float16.
  bool overflows() const { return E::dtype == DType::float16 && loss.kind == LossKind::dimp && loss.p0 == inf; }
  bool ordinary(int64_t i) const { return !overflows() && (!has_pattern(i) || is_ordinary(pattern)); }
  bool undefined(int64_t i) const {
    if (!has_pattern(i)) return false;
    if (pattern == Pattern::impossible_target || pattern == Pattern::impossible_class) return c == 1;
    return pattern >= Pattern::all_impossible && pattern <= Pattern::all_nan;
  }

  int64_t target_of(int64_t i) const { return setup.expanded ? (c - 1) / 2 : (i * 7 + 3) % c; }
  int64_t hostile_column(int64_t i) const { return (target_of(i) + c - 1) % c; }

  T logit(int64_t i, int64_t j) {
    const double ordinary = random.uniform(-3, 3);
    const bool hostile = has_pattern(i), here = j == hostile_column(i);
    if (!hostile) return E::encode(ordinary);
    switch (pattern) {
      case Pattern::ascending:
        return E::encode(8.0 * double(j) / double(c));
      case Pattern::impossible_class:
        return E::encode(here ? -inf : ordinary);
      case Pattern::impossible_target:
        return E::encode(j == target_of(i) ? -inf : ordinary);
      case Pattern::all_impossible:
        return E::encode(-inf);
      case Pattern::infinite:
        return E::encode(here ? inf : ordinary);
      case Pattern::nan:
        return E::encode(here ? std::numeric_limits<double>::quiet_NaN() : ordinary);
      case Pattern::nan_all_bits:
        return here ? all_bits_set<T>() : E::encode(ordinary);
      case Pattern::all_nan:
        return all_bits_set<T>();
      case Pattern::huge:
        return E::encode(j % 3 == 0 ? 1e4 : j % 3 == 1 ? -1e4 : ordinary);
      default:
        return E::encode(ordinary);
    }
  }

  void write_row(int64_t i) {
    const int64_t y = ignored(i) ? ignore_index : target_of(i);
    // Little-endian: the low bytes of the index are its narrow form.
    std::memcpy(target.data() + i * index_width(type), &y, size_t(index_width(type)));
    for (int64_t j = 0; j < c; ++j) {
      logits[i * stride + j] = logit(i, j);
      v[i * c + j] = E::encode(random.uniform(-1, 1));
    }
    weight[i] = A(setup.zero_weight && i == 0 ? 0 : random.uniform(0.5, 2));
    ratio[i] = A(loss.ratio_is_log() ? random.uniform(-1, 0.5) : random.uniform(0.2, 1));
    coefficient[i] = A(random.uniform(0.5, 2));
    extra[i] = A(random.uniform(-1, 1));
    grad[i] = A(random.uniform(0.5, 2));
  }

  Rows rows(void* statistics) const {
    double class_weight_sum = double(c);
    if (setup.class_weight) {
      class_weight_sum = 0;
      for (int64_t j = 0; j < c; ++j) class_weight_sum += double(class_weight[j]);
    }
    return {logits.data(), stride, E::dtype, target.data(), type, n, c, ignore_index,
            setup.weight ? weight.data() : nullptr, loss.has_ratio() ? ratio.data() : nullptr,
            setup.class_weight ? class_weight.data() : nullptr, class_weight_sum,
            {loss.kind, loss.p0, loss.p1, loss.p2, setup.label_smoothing, setup.z_loss}, statistics};
  }

  std::string where() const {
    return std::string(E::name) + ", " + loss.name + ", " + setup.name + ", " + pattern_names[int(pattern)] + ", " +
           std::to_string(n) + " x " + std::to_string(c);
  }

  const Loss& loss;
  const Setup& setup;
  Pattern pattern;
  int64_t n, c;
  IndexType type;
  int64_t stride, ignore_index;
  Random random;
  Array<T> logits;
  Array<char> target;
  Array<A> weight, ratio, class_weight;
  Array<T> v;
  Array<A> coefficient, extra, grad;
};

constexpr double scale = 1.5, denominator = 2;

// Every output of every kernel, over memory filled with `poison`; the rows at once, or one call a row.
template <typename E>
struct Outputs {
  using T = typename E::Storage;
  using A = typename E::Wide;

  Outputs(const Problem<E>& p, int poison, bool row_by_row)
      : loss(p.n, poison), statistics(statistics_rows * p.n, poison), gradient(p.n * p.c, poison),
        grad_weight(p.n, poison), scaled_gradient(p.n * p.c, poison), fused_loss(p.n, poison),
        fused_statistics(statistics_rows * p.n, poison), fused_gradient(p.n * p.c, poison),
        fused_grad_weight(p.n, poison), tangent(p.n, poison), hvp(p.n * p.c, poison), directional(p.n, poison),
        plain_hvp(p.n * p.c, poison), plain_directional(p.n, poison), hessian(p.n * p.c, poison) {
    for (int64_t i = 0; i < p.n; ++i)
      statistics[stat_denominator * p.n + i] = fused_statistics[stat_denominator * p.n + i] = A(denominator);
    for (int64_t end = p.n; end > 0;) {
      const int64_t begin = row_by_row ? end - 1 : 0;
      run(p, begin, end);
      end = begin;
    }
    if (p.n == 0) run(p, 0, 0);
  }

  void run(const Problem<E>& p, int64_t begin, int64_t end) {
    const RowKernels& k = row_kernels();
    const Rows r = p.rows(statistics.data());
    k.forward(r, loss.data(), begin, end);
    k.backward(r, p.grad.data(), 0, gradient.data(), grad_weight.data(), begin, end);
    k.backward(r, nullptr, scale * denominator, scaled_gradient.data(), nullptr, begin, end);
    k.forward_backward(p.rows(fused_statistics.data()), scale, fused_loss.data(), fused_gradient.data(),
                       fused_grad_weight.data(), begin, end);
    k.tangent(r, p.v.data(), p.c, p.coefficient.data(), tangent.data(), begin, end);
    k.hvp(r, p.v.data(), p.c, p.coefficient.data(), p.extra.data(), hvp.data(), directional.data(), begin, end);
    k.hvp(r, p.v.data(), p.c, nullptr, nullptr, plain_hvp.data(), plain_directional.data(), begin, end);
    k.hessian_diagonal(r, hessian.data(), begin, end);
  }

  bool same_bits(const Outputs& o) const {
    return loss.same_bits(o.loss) && statistics.same_bits(o.statistics) && gradient.same_bits(o.gradient) &&
           grad_weight.same_bits(o.grad_weight) && scaled_gradient.same_bits(o.scaled_gradient) &&
           fused_loss.same_bits(o.fused_loss) && fused_statistics.same_bits(o.fused_statistics) &&
           fused_gradient.same_bits(o.fused_gradient) && fused_grad_weight.same_bits(o.fused_grad_weight) &&
           tangent.same_bits(o.tangent) && hvp.same_bits(o.hvp) && directional.same_bits(o.directional) &&
           plain_hvp.same_bits(o.plain_hvp) && plain_directional.same_bits(o.plain_directional) &&
           hessian.same_bits(o.hessian);
  }

  std::vector<const Array<T>*> matrices() const {
    return {&gradient, &scaled_gradient, &fused_gradient, &hvp, &plain_hvp, &hessian};
  }

  Array<A> loss, statistics;
  Array<T> gradient;
  Array<A> grad_weight;
  Array<T> scaled_gradient;
  Array<A> fused_loss, fused_statistics;
  Array<T> fused_gradient;
  Array<A> fused_grad_weight, tangent;
  Array<T> hvp;
  Array<A> directional;
  Array<T> plain_hvp;
  Array<A> plain_directional;
  Array<T> hessian;
};

// ---- What must hold ----------------------------------------------------------------------------------------------

template <typename E, typename Holds>
bool all_of_row(const Array<typename E::Storage>& matrix, int64_t i, int64_t c, Holds holds) {
  for (int64_t j = 0; j < c; ++j)
    if (!holds(E::decode(matrix[i * c + j]))) return false;
  return true;
}

bool is_zero(double x) { return x == 0; }
bool is_nan(double x) { return std::isnan(x); }
bool is_finite(double x) { return std::isfinite(x); }

template <typename E>
void check_left_out_row(const Problem<E>& p, const Outputs<E>& o, int64_t i) {
  expect(o.loss[i] == 0 && o.fused_loss[i] == 0, p.where(), "the loss of a row left out is zero");
  // A weight of zero stops the gradient alone: the rest is that of the unweighted loss.
  for (const Array<typename E::Storage>* m : {&o.gradient, &o.scaled_gradient, &o.fused_gradient, &o.hessian})
    expect(all_of_row<E>(*m, i, p.c, is_zero), p.where(), "the derivatives of a row left out are zero");
  if (!p.ignored(i)) return;
  expect(o.grad_weight[i] == 0 && o.fused_grad_weight[i] == 0, p.where(), "an ignored row's weight has no gradient");
  expect(o.tangent[i] == 0 && o.directional[i] == 0, p.where(), "the tangent of an ignored row is zero");
  expect(all_of_row<E>(o.hvp, i, p.c, is_zero), p.where(), "the product with an ignored row's Hessian is zero");
}

template <typename E>
void check_undefined_row(const Problem<E>& p, const Outputs<E>& o, int64_t i) {
  expect(is_nan(o.loss[i]) && is_nan(o.fused_loss[i]), p.where(), "the loss of a row with NaN is NaN");
  expect(is_nan(o.tangent[i]) && is_nan(o.directional[i]), p.where(), "the tangent of a row with NaN is NaN");
  for (const Array<typename E::Storage>* m : o.matrices())
    expect(all_of_row<E>(*m, i, p.c, is_nan), p.where(), "every derivative of a row with NaN is NaN");
}

// Label smoothing subtracts its share from what it is added to: the rounding is that of the terms, not of the rest.
template <typename E>
double size_of_cancelled_terms(const Problem<E>& p) {
  return 4 * p.setup.label_smoothing;  // over all classes; weight, class weight and scale are at most 2, 2 and 1.5
}

template <typename E>
void check_sums_to_zero(const Problem<E>& p, const Array<typename E::Storage>& gradient, int64_t i) {
  double sum = 0, size = size_of_cancelled_terms(p);
  for (int64_t j = 0; j < p.c; ++j) {
    const double g = E::decode(gradient[i * p.c + j]);
    sum += g;
    size += std::fabs(g);
  }
  const double allowed = E::relative * size + E::absolute * double(p.c);
  expect(std::fabs(sum) <= allowed, p.where(), "the gradient of a row sums to zero");
}

template <typename E>
bool close(double a, double b, double cancelled = 0) {
  return std::fabs(a - b) <= E::relative * (std::fabs(a) + std::fabs(b) + cancelled) + 2 * E::absolute;
}

template <typename E>
void check_ordinary_row(const Problem<E>& p, const Outputs<E>& o, int64_t i) {
  using Wide = std::conditional_t<E::dtype == DType::float64, Float64, Float32>;
  for (const Array<typename E::Storage>* m : o.matrices())
    expect(all_of_row<E>(*m, i, p.c, is_finite), p.where(), "the derivatives of an ordinary row are finite");
  expect(close<Wide>(o.loss[i], o.fused_loss[i]), p.where(), "forward and forward_backward agree on the loss");
  expect(close<Wide>(o.tangent[i], double(p.coefficient[i]) * o.directional[i]), p.where(), "tangent and hvp agree");
  if (p.setup.z_loss == 0)
    for (const Array<typename E::Storage>* m : {&o.gradient, &o.scaled_gradient, &o.fused_gradient})
      check_sums_to_zero(p, *m, i);
  bool agree = true;
  for (int64_t j = 0; j < p.c; ++j)
    agree &= close<E>(E::decode(o.scaled_gradient[i * p.c + j]), E::decode(o.fused_gradient[i * p.c + j]),
                      size_of_cancelled_terms(p) / double(p.c));
  expect(agree, p.where(), "backward and forward_backward agree on the gradient");
}

template <typename E>
void check_impossible_class(const Problem<E>& p, const Outputs<E>& o, int64_t i) {
  if (p.setup.label_smoothing != 0) return;
  for (const Array<typename E::Storage>* m : o.matrices())
    expect(E::decode((*m)[i * p.c + p.hostile_column(i)]) == 0, p.where(), "an impossible class has no derivative");
  if (p.setup.z_loss == 0) check_sums_to_zero(p, o.gradient, i);
}

template <typename E>
void check(const Loss& loss, const Setup& setup, Pattern pattern, int64_t n, int64_t c) {
  const Problem<E> p(loss, setup, pattern, n, c);
  const Outputs<E> o(p, 0xa5, false), again(p, 0x5a, true);
  ++problems;
  expect(o.same_bits(again), p.where(), "every output is written, with the same bits however the rows are split");
  for (int64_t i = 0; i < n; ++i) {
    if (p.left_out(i))
      check_left_out_row(p, o, i);
    else if (p.undefined(i))
      check_undefined_row(p, o, i);
    else if (p.ordinary(i))
      check_ordinary_row(p, o, i);
    else if (p.pattern == Pattern::impossible_class && p.has_pattern(i) && !p.overflows())
      check_impossible_class(p, o, i);
  }
}

// Long rows cost the most and differ from short ones in their blocks alone: each pattern meets one setup there.
template <typename E>
void check_all(int64_t c) {
  constexpr int setup_count = int(sizeof setups / sizeof *setups);
  for (const Loss& loss : losses)
    for (int s = 0; s < setup_count; ++s)
      for (int pattern = 0; pattern < int(Pattern::count); ++pattern) {
        if (c > 1000 && pattern != 0 && pattern % setup_count != s) continue;
        for (int64_t n : {0, 1, 3}) check<E>(loss, setups[s], Pattern(pattern), n, c);
      }
}

template <typename E>
void check_dtype() {
  for (int64_t c : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 100, 4095, 4096, 4097, 10000}) check_all<E>(c);
  // A row too long for its exponentials to be kept.
  check<E>(losses[0], setups[0], Pattern::random, 1, (int64_t(1) << 20) + 1);
}

// Column j of the Hessian, at j, is the diagonal's entry.
void check_hessian_diagonal() {
  for (const Loss& loss : losses)
    for (const Setup& setup : setups) {
      if (setup.weight) continue;  // the diagonal holds the sample weight, the product does not
      const int64_t n = 3, c = 9;
      const Problem<Float64> p(loss, setup, Pattern::random, n, c);
      const Outputs<Float64> o(p, 0, false);
      const Array<double> one(n * c), out(n * c), directional(n);
      for (int64_t j = 0; j < c; ++j) {
        for (int64_t i = 0; i < n * c; ++i) one[i] = i % c == j;
        row_kernels().hvp(p.rows(o.statistics.data()), one.data(), c, nullptr, nullptr, out.data(), directional.data(),
                          0, n);
        for (int64_t i = 0; i < n; ++i)
          expect(std::fabs(out[i * c + j] - o.hessian[i * c + j]) < 1e-11, p.where(),
                 "the Hessian's diagonal is that of its columns");
      }
    }
}

// Weights, ratios and class weights that are no numbers: NaN must come out as NaN in every dtype.
template <typename E>
void check_hostile_operands() {
  for (const Loss& loss : losses)
    for (int64_t c : {2, 9, 100}) {
      const Setup setup{"operands of NaN", true, true, 0.1, 0, 0, false, false, false, IndexType::int64};
      const Problem<E> p(loss, setup, Pattern::random, 3, c);
      using A = typename E::Wide;
      p.weight[0] = all_bits_set<A>();
      p.weight[1] = A(inf);
      p.ratio[1] = A(-inf);
      p.ratio[2] = all_bits_set<A>();
      p.grad[1] = all_bits_set<A>();
      p.coefficient[0] = all_bits_set<A>();
      p.extra[1] = all_bits_set<A>();
      const Outputs<E> without(p, 0xa5, false), again(p, 0x5a, true);
      expect(without.same_bits(again), p.where(), "every output is written");
      expect(all_of_row<E>(without.gradient, 0, c, is_nan), p.where(), "a weight of NaN gives a gradient of NaN");
      expect(all_of_row<E>(without.gradient, 1, c, is_nan), p.where(), "a cotangent of NaN gives a gradient of NaN");
      for (int64_t j = 0; j < c; ++j) p.class_weight[j] = all_bits_set<A>();
      const Outputs<E> o(p, 0xa5, false);
      ++problems;
      for (int64_t i = 0; i < 3; ++i)
        for (const Array<typename E::Storage>* m : o.matrices())
          expect(all_of_row<E>(*m, i, c, is_nan), p.where(), "class weights of NaN give derivatives of NaN");
    }
}

void check_scale() {
  for (int64_t size : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 4097})
    for (int64_t begin : {int64_t(0), size / 3, size}) {
      const int64_t end = std::max(begin, size - size / 4);
      const Array<float> x(size);
      for (int64_t j = 0; j < size; ++j) x[j] = float(j + 1);
      row_kernels().scale_float32(x.data(), -0.5, begin, end);
      ++problems;
      for (int64_t j = 0; j < size; ++j) {
        const float factor = j >= begin && j < end ? -0.5f : 1.0f;
        expect(x[j] == factor * float(j + 1), "scale_float32", "scales the range alone");
      }
    }
}

void check_targets() {
  for (IndexType type : {IndexType::int64, IndexType::int32, IndexType::int16, IndexType::uint8}) {
    const Setup setup{"targets", false, true, 0, 0, 0, false, true, false, type};
    const Problem<Float32> p(losses[0], setup, Pattern::random, 5, 7);
    const Rows rows = p.rows(nullptr);
    expect(first_bad_target(rows) == -1, p.where(), "an ignored target is not a bad one");
    double expected = 0;
    for (int64_t i = 0; i < 4; ++i) expected += double(p.class_weight[p.target_of(i)]);
    expect(std::fabs(kept_weight(rows) - expected) < 1e-6, p.where(), "the class weights of the kept rows add up");
    p.target[3 * index_width(type)] = 7;  // the lowest byte; the others of a small index are zero
    expect(first_bad_target(rows) == 3, p.where(), "the first class out of range is found");
    ++problems;
  }
  for (int64_t classes : {1, 2, 1000, 1000000}) expect(row_grain(classes) >= 1, "row_grain", "a task has a row");
}

// ---- Memory of large outputs -------------------------------------------------------------------------------------

bool holds_bytes(void* data, int64_t bytes, int value) {
  std::memset(data, value, size_t(bytes));
  const unsigned char* p = static_cast<unsigned char*>(data);
  return p[0] == value && p[bytes / 2] == value && p[bytes - 1] == value;
}

void check_output_memory_sizes() {
  const int64_t mib = 1 << 20;
  int value = 1;
  for (int64_t bytes : {large_output, large_output + 1, 17 * mib - 1, 64 * mib, 33 * mib, 32 * mib, 31 * mib,
                        8 * mib, 2 * mib + 1, int64_t(1), 9 * mib, 40 * mib}) {
    void* data = allocate_output(bytes);
    expect(data != nullptr, "output memory", "is given");
    if (!data) continue;
    expect(reinterpret_cast<uintptr_t>(data) % 64 == 0, "output memory", "is aligned for vectors");
    expect(holds_bytes(data, bytes, value++), "output memory", "is there to the last byte");
    release_output(data);
    ++problems;
  }
  void *first = allocate_output(10 * mib), *second = allocate_output(10 * mib);
  expect(first != second, "output memory", "is not given twice");
  std::memset(first, 1, size_t(10 * mib));
  expect(holds_bytes(second, 10 * mib, 2) && static_cast<char*>(first)[10 * mib - 1] == 1, "output memory",
         "is one output's alone");
  release_output(first);
  release_output(second);
  expect(allocate_output(9 * mib) == second, "output memory", "the last one released is given again");
  release_output(second);
  empty_output_cache();
  empty_output_cache();
  expect(allocate_output(int64_t(1) << 60) == nullptr, "output memory", "what cannot be had is null");
  void* after = allocate_output(10 * mib);
  expect(after && holds_bytes(after, 10 * mib, 3), "output memory", "is given after a refusal");
  release_output(after);
  empty_output_cache();
}

void check_output_memory_threads() {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &wrong] {
      for (int round = 0; round < 50; ++round) {
        const int64_t bytes = (int64_t(8 + (t * 7 + round * 5) % 12) << 20) - round;
        auto* data = static_cast<unsigned char*>(allocate_output(bytes));
        for (int64_t i = 0; i < bytes; i += 4096) data[i] = static_cast<unsigned char>(t);
        data[bytes - 1] = static_cast<unsigned char>(t);
        std::this_thread::yield();
        for (int64_t i = 0; i < bytes; i += 4096) wrong[size_t(t)] += data[i] != t;
        wrong[size_t(t)] += data[bytes - 1] != t;
        release_output(data);
        if (round % 10 == 9) empty_output_cache();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong) expect(count == 0, "output memory", "is one thread's alone");
}

void check_output_memory() {
  void* probe = allocate_output(large_output);
  if (!probe) return;  // a platform without: outputs come from the ordinary allocator
  release_output(probe);
  check_output_memory_sizes();
  check_output_memory_threads();
}

}  // namespace

int main() {
  const char *asked = std::getenv("SYNKERN_ISA"), *isa = row_kernels().isa;
  if (asked && std::strcmp(asked, isa)) {
    std::printf("%s is not to be had on this processor; it got %s\n", asked, isa);
    return exit_other_isa;
  }
  check_dtype<Float32>();
  check_dtype<Float64>();
  check_dtype<BFloat16>();
  check_dtype<Float16>();
  check_hessian_diagonal();
  check_hostile_operands<Float32>();
  check_hostile_operands<Float64>();
  check_hostile_operands<BFloat16>();
  check_hostile_operands<Float16>();
  check_scale();
  check_targets();
  check_output_memory();
  check_contraction();
  check_lstm();
  std::printf("%s: %lld problems, %lld failed checks\n", isa, static_cast<long long>(problems),
              static_cast<long long>(failures));
  return failures ? 1 : 0;
}
