// The row kernels. Each is one reduction over a row and at most one pass that writes it; the loss enters through
// losses/row_terms.h, once a row, as a run-time value.
#pragma once
#include <cstdio>

#include "cuda/device.cuh"
#include "cuda/rows.h"

namespace synkern {

template <typename T>
__device__ __forceinline__ const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + stride * row;
}

template <typename A>
__device__ __forceinline__ const A* class_weights(const DeviceRows& p) {
  return static_cast<const A*>(p.rows.class_weight);
}

// A row that no loss is taken of: ignored rows count zero everywhere. A target out of range makes its row NaN, whatever
// the weight, and stops the launch in debug builds; raising would have to wait for the device.
struct LeftOut {
  bool left_out;
  double fill;
};

__device__ __forceinline__ LeftOut left_out(const Rows& rows, int64_t row, int64_t target) {
  if (target == rows.ignore_index) return {true, 0.0};
  if (target >= 0 && target < rows.classes) return {false, 0.0};
#if defined(SYNKERN_CUDA_DEBUG)
  printf("synkern: target[%lld] is %lld, expected a class in [0, %lld) or ignore_index (%lld)\n", (long long)row,
         (long long)target, (long long)rows.classes, (long long)rows.ignore_index);
  stop_launch();
#else
  (void)row;
#endif
  return {true, double(NAN)};
}

// What a row adds to the mean's denominator; a target out of range has no class weight.
template <typename A>
__device__ __forceinline__ double kept_weight_at(const Rows& rows, int64_t row) {
  const int64_t target = target_at(rows, row);
  if (target == rows.ignore_index) return 0.0;
  if (!rows.class_weight) return 1.0;
  return target >= 0 && target < rows.classes ? double(static_cast<const A*>(rows.class_weight)[target]) : 0.0;
}

// By every lane of a warp.
__device__ __forceinline__ double value_of(const Denominator& d) {
  if (d.count == 0) return 1.0;
  const int lane = int(threadIdx.x) % warp_lanes;
  return sum_over_lanes(lane < d.count ? d.partials[lane] : 0.0, warp_lanes);
}

struct BlockSlots {
  double sums[warp_lanes];
};

// Over the threads of a block; `slots` is used once.
__device__ __forceinline__ double sum_over_block(double x, BlockSlots& slots) {
  x = sum_over_lanes(x, warp_lanes);
  if (threadIdx.x % warp_lanes == 0) slots.sums[threadIdx.x / warp_lanes] = x;
  sync_block();
  x = slots.sums[0];
  for (int i = 1; i < int(blockDim.x) / warp_lanes; ++i) x += slots.sums[i];
  return x;
}

template <typename A>
__device__ __forceinline__ double sum_of_losses(const A* losses, int64_t begin, int64_t end) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += double(losses[i]);
  return sum;
}

template <typename A>
__device__ __forceinline__ double sum_of_kept_weights(const Rows& rows, int64_t begin, int64_t end) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += kept_weight_at<A>(rows, i);
  return sum;
}

// The numbers of a row that are not its logits, read while those are on their way.
struct RowInputs {
  double z_y, class_weight, class_weight_sum, ratio, weight;
  double denominator, v_y;  // where a kernel has them
};

template <typename T>
__device__ __forceinline__ RowInputs row_inputs(const DeviceRows& p, int64_t row, int64_t target) {
  using A = acc_t<T>;
  return {double(load(row_of<T>(p.rows.logits, p.rows.logits_stride, row)[target])),
          at_or<A>(p.rows.class_weight, target, 1.0),
          p.class_weight_sum ? *p.class_weight_sum : double(p.rows.classes), at_or<A>(p.rows.ratio, row, 1.0),
          at_or<A>(p.rows.weight, row, 1.0), 1.0, 0.0};
}

template <typename A>
__device__ __forceinline__ RowContext context_of(const DeviceRows& p, int64_t target, const RowInputs& in,
                                                 const RowStatistics& s) {
  return row_context<A>(p.rows.loss, p.rows.classes, in.class_weight_sum, target, in.class_weight, in.ratio, s, in.z_y);
}

// total: the exponentials below the maximum, the number of maxima, sum cw (z - max)
template <typename A>
__device__ __forceinline__ RowStatistics statistics_of(A max, const Sums& total) {
  const double m = double(max);
  const bool finite = fabs(m) < double(INFINITY);
  return {m, finite ? total.x + (total.y - 1.0) : double(NAN), total.z};
}

// What the writing pass of a row needs: out = e^(z - max) (alpha + beta v) + kappa cw
template <typename A>
struct Terms {
  A max, alpha, beta, kappa, at_target;
  bool zero;
};

template <typename A>
__device__ __forceinline__ Terms<A> gradient_of(const RowContext& c, double coefficient) {
  const GradientTerms g = gradient_terms(c, coefficient);
  return {A(c.max), A(g.alpha), A(0), A(g.kappa), A(g.at_target), c.flat || coefficient == 0.0};
}

template <typename A>
__device__ __forceinline__ A class_term(const Terms<A>& t, const A* class_weight, int64_t j) {
  return class_weight ? t.kappa * class_weight[j] : t.kappa;
}

template <typename T, RowClass C>
__device__ __forceinline__ void fill_row(const Group<acc_t<T>, C>& g, T* out, int64_t classes, double value) {
  for_own<T>(span_of(out, classes, g.part, g.parts), g.rank, g.size, [&](auto count, int64_t j) {
    acc_t<T> x[decltype(count)::value];
    for (auto& each : x) each = acc_t<T>(value);
    write(out + j, x);
  });
}

// The target's column is written after the others by one thread, and is not looked for by all.
template <typename T, RowClass C>
__device__ __forceinline__ void write_target(const Group<acc_t<T>, C>& g, const Span& s, int64_t target,
                                             acc_t<T> value, T* out) {
  g.sync();
  if (g.rank == 0 && target >= s.begin && target < s.end) store(value, out + target);
}

// The span's part of a gradient row.
template <typename T, RowClass C, typename Source>
__device__ __forceinline__ void write_gradient(const Group<acc_t<T>, C>& g, const DeviceRows& p, const Span& s,
                                               const Source& z, const Terms<acc_t<T>>& t, int64_t target, T* out) {
  using A = acc_t<T>;
  if (t.zero) return fill_row<T, C>(g, out, p.rows.classes, 0.0);
  const A* class_weight = class_weights<A>(p);
  for_own<T>(s, g.rank, g.size, [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    A x[n];
    z.read(j, x);
    for (int i = 0; i < n; ++i) x[i] = t.alpha * exp_nonpositive(x[i] - t.max);
    if (t.kappa != A(0))
      for (int i = 0; i < n; ++i) x[i] += class_term(t, class_weight, j + i);
    write(out + j, x);
  });
  write_target(g, s, target, t.at_target, out);
}

// ---- Reductions over a row ------------------------------------------------------------------------------------------

// Vectors of shared memory that hold a part of a row: one more at each end for single elements.
template <typename T>
__host__ __device__ __forceinline__ int64_t held_vectors(int64_t classes, int64_t parts) {
  return ceil_div(classes / width<T>, parts) + 2;
}

// Starts the copies of a group's part of a row; the caller waits for them.
template <typename T, RowClass C>
__device__ __forceinline__ InShared<T> hold(const Group<acc_t<T>, C>& g, const Span& s, const T* row, uint4* to) {
  T* base = reinterpret_cast<T*>(to);
  const int64_t first = s.head - width<T>;
  for (int64_t j = s.begin + g.rank; j < s.head; j += g.size) base[j - first] = row[j];
  const uint4* from = reinterpret_cast<const uint4*>(row + s.head);
  const int vectors = int((s.tail - s.head) / width<T>);
  for (int i = g.rank; i < vectors; i += g.size) copy_async(to + 1 + i, from + i);
  for (int64_t j = s.tail + g.rank; j < s.end; j += g.size) base[j - first] = row[j];
  return {base, first};
}

// Where a group's held rows start in the block's shared memory, `each` vectors a row.
template <typename A, RowClass C>
__device__ __forceinline__ uint4* shared_of(const Group<A, C>&, int64_t each) {
  return dynamic_shared() + (C == RowClass::warp ? int64_t(threadIdx.x / warp_lanes) * each : 0);
}

// Waits for the copies. Another thread's elements may be read after the next barrier, which in a block is that of the
// first reduction; shuffles are none.
template <typename A, RowClass C>
__device__ __forceinline__ void await_copies(const Group<A, C>&) {
  copies_done();
  if constexpr (C == RowClass::warp) sync_warp();
}

template <typename T>
__device__ __forceinline__ acc_t<T> own_max(const Span& s, int rank, int size, const InShared<T>& z) {
  using A = acc_t<T>;
  A m = -A(INFINITY);
  if constexpr (sizeof(T) == 2) {
    uint32_t pair = pack2<T>(m, m);
    for_own<T>(s, rank, size, [&](auto count, int64_t j) {
      if constexpr (decltype(count)::value == 1) {
        m = max_nan(m, load(*z.at(j)));
      } else {
        const uint4 v = *reinterpret_cast<const uint4*>(z.at(j));
        pair = max2_nan<T>(pair, max2_nan<T>(max2_nan<T>(v.x, v.y), max2_nan<T>(v.z, v.w)));
      }
    });
    return max_nan(m, max_nan(load(T{uint16_t(pair & 0xffffu)}), load(T{uint16_t(pair >> 16)})));
  } else {
    for_own<T>(s, rank, size, [&](auto count, int64_t j) {
      A x[decltype(count)::value];
      z.read(j, x);
      for (A each : x) m = max_nan(m, each);
    });
    return m;
  }
}

// The exponentials and, where a lane holds the maximum, those below it and the number of maxima: their sum is a 1 that
// would swallow small terms. Only one warp or so of a row pays for telling them apart.
template <bool HoldsMax, typename T, typename Source>
__device__ __forceinline__ Sums own_sums(const Span& s, int rank, int size, const Source& z, acc_t<T> max) {
  using A = acc_t<T>;
  double sum = 0;
  int maxima = 0;
  for_own<T>(s, rank, size, [&](auto count, int64_t j) {
    A x[decltype(count)::value], part = 0;
    z.read(j, x);
    for (A each : x) {
      const A e = exp_nonpositive(each - max);
      if (HoldsMax && each == max)
        ++maxima;
      else
        part += e;
    }
    sum += double(part);
  });
  return {sum, double(maxima), 0.0};
}

// Sum of class_weight (z - origin) over the own elements.
template <typename T, typename Source>
__device__ __forceinline__ double own_weighted_sum(const Span& s, int rank, int size, const Source& z, acc_t<T> origin,
                                                   const acc_t<T>* class_weight) {
  using A = acc_t<T>;
  double sum = 0;
  for_own<T>(s, rank, size, [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    A x[n], part = 0;
    z.read(j, x);
    for (int i = 0; i < n; ++i) part += class_weight ? class_weight[j + i] * (x[i] - origin) : x[i] - origin;
    sum += double(part);
  });
  return sum;
}

// Maximum and exponentials in one read, from the thread's own maximum so far.
template <typename T>
struct Running {
  using A = acc_t<T>;
  A max = -A(INFINITY);
  double sum = 0, maxima = 0;

  __device__ __forceinline__ void move_to(A m) {
    if (m == max) return;
    sum = (sum + maxima) * double(exp_nonpositive(max - m));
    maxima = 0;
    max = m;
  }

  template <typename Source>
  __device__ __forceinline__ void read(const Span& s, int rank, int size, const Source& z) {
    for_own<T>(s, rank, size, [&](auto count, int64_t j) {
      A x[decltype(count)::value], m = max, part = 0;
      z.read(j, x);
      for (A each : x) m = max_nan(m, each);
      move_to(m);
      if (max == -A(INFINITY)) return;  // -inf - -inf is NaN
      for (A each : x) {
        const A e = exp_nonpositive(each - max);
        if (each == max)
          maxima += 1;
        else
          part += e;
      }
      sum += double(part);
    });
  }
};

template <typename T, RowClass C>
__device__ __forceinline__ RowStatistics reduce_held(const Group<acc_t<T>, C>& g, const DeviceRows& p, const Span& s,
                                                     const InShared<T>& z) {
  using A = acc_t<T>;
  const A mine = own_max<T>(s, g.rank, g.size, z), m = g.max(mine);
  Sums sums = any_lane(mine == m) ? own_sums<true, T>(s, g.rank, g.size, z, m)
                                  : own_sums<false, T>(s, g.rank, g.size, z, m);
  if (p.rows.loss.label_smoothing != 0.0)
    sums.z = own_weighted_sum<T>(s, g.rank, g.size, z, m, class_weights<A>(p));
  return statistics_of(m, g.sum(sums));
}

template <typename T, RowClass C>
__device__ __forceinline__ RowStatistics reduce_stream(const Group<acc_t<T>, C>& g, const DeviceRows& p, const Span& s,
                                                       const InGlobal<T>& z) {
  using A = acc_t<T>;
  Running<T> running;
  running.read(s, g.rank, g.size, z);
  const A m = g.max(running.max);
  running.move_to(m);
  Sums sums{running.sum, running.maxima, 0.0};
  if (p.rows.loss.label_smoothing != 0.0)
    sums.z = own_weighted_sum<T>(s, g.rank, g.size, z, m, class_weights<A>(p));
  return statistics_of(m, g.sum(sums));
}

// ---- Kernels for rows of more than small_classes ---------------------------------------------------------------------

// Threads of a block at most, and blocks on a multiprocessor at least: the registers that a thread may have follow.
constexpr int warp_class_rows = 4;  // of a block
constexpr int threads_of(RowClass c) { return c == RowClass::warp ? warp_class_rows * warp_lanes : most_threads; }
constexpr int blocks_of(RowClass c, size_t element) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return element == 8 || c != RowClass::warp ? 1 : 4;  // its double-precision functions take more registers
#else
  return element == 8 ? 1 : c == RowClass::warp ? 6 : 2;
#endif
}

// What a block's threads share of its row.
template <typename A>
struct Shared {
  Slots<A> slots;
  Terms<A> terms;
  RowInputs inputs[warp_class_rows];
};

// The row's place for its inputs, which the leading warp fills while the row is on its way. They wait in shared memory:
// in registers, across the passes over the row, they would be spilled.
template <typename A, RowClass C>
__device__ __forceinline__ RowInputs& inputs_of(const Group<A, C>&, Shared<A>& shared) {
  return shared.inputs[C == RowClass::warp ? threadIdx.x / warp_lanes : 0];
}

// From the leading warp to all of the group.
template <typename A, RowClass C>
__device__ __forceinline__ Terms<A> share(const Group<A, C>& g, Terms<A>& shared, const Terms<A>& terms) {
  if constexpr (C == RowClass::warp) {
    return terms;
  } else {
    if (g.rank == 0) shared = terms;
    g.sync();
    return shared;
  }
}

template <typename T, RowClass C>
__device__ __forceinline__ void forward_left_out(const Group<acc_t<T>, C>& g, const DeviceRows& p,
                                                 const ForwardOutputs& o, double fill, double denominator) {
  using A = acc_t<T>;
  if (o.gradient) fill_row<T, C>(g, static_cast<T*>(o.gradient) + g.row * p.rows.classes, p.rows.classes, fill);
  if (!g.leader()) return;
  save_statistics<A>(p.rows, g.row, {fill, fill, fill}, fill);
  static_cast<A*>(p.rows.statistics)[stat_denominator * p.rows.rows + g.row] = A(denominator);
  static_cast<A*>(o.losses)[g.row] = A(fill);
  if (o.grad_weight) static_cast<A*>(o.grad_weight)[g.row] = A(fill);
}

// By the leading warp.
template <typename T, RowClass C>
__device__ __forceinline__ Terms<acc_t<T>> finish_row(const Group<acc_t<T>, C>& g, const DeviceRows& p,
                                                      const ForwardOutputs& o, int64_t target, const RowInputs& in,
                                                      const RowStatistics& s) {
  using A = acc_t<T>;
  const RowContext c = context_of<A>(p, target, in, s);
  const double scale = 1.0 / in.denominator;
  if (g.leader()) {
    save_statistics<A>(p.rows, g.row, s, c.ratio);
    static_cast<A*>(p.rows.statistics)[stat_denominator * p.rows.rows + g.row] = A(in.denominator);
    static_cast<A*>(o.losses)[g.row] = A(weighted_value(c, in.weight));
    if (o.grad_weight) static_cast<A*>(o.grad_weight)[g.row] = A(scale * c.value);
  }
  return gradient_of<A>(c, scale * in.weight);
}

template <typename T, RowClass C>
__global__ void __launch_bounds__(threads_of(C), blocks_of(C, sizeof(T)))
    forward_wide(const DeviceRows p, const ForwardOutputs o) {
  using A = acc_t<T>;
  if constexpr (C == RowClass::cluster && !has_clusters) return;
  SYNKERN_SHARED(Shared<A>, shared);
  const Group<A, C> g(shared.slots);
  if (g.row >= p.rows.rows) return;
  const int64_t target = target_at(p.rows, g.row);
  const LeftOut out_of_loss = left_out(p.rows, g.row, target);
  if (out_of_loss.left_out)
    return forward_left_out<T, C>(g, p, o, out_of_loss.fill, g.leading_warp() ? value_of(o.denominator) : 1.0);
  const T* z = row_of<T>(p.rows.logits, p.rows.logits_stride, g.row);
  const Span s = span_of(z, p.rows.classes, g.part, g.parts);
  RowInputs& in = inputs_of(g, shared);
  const auto read_inputs = [&] {
    if (!g.leading_warp()) return;
    const double denominator = value_of(o.denominator);
    if (g.rank == 0) {
      in = row_inputs<T>(p, g.row, target);
      in.denominator = denominator;
    }
    sync_warp();
  };
  const auto finish = [&](const RowStatistics& statistics) {
    Terms<A> terms{};
    if (g.leading_warp()) terms = finish_row<T, C>(g, p, o, target, in, statistics);
    return share(g, shared.terms, terms);
  };
  T* out = static_cast<T*>(o.gradient) + g.row * p.rows.classes;
  const auto write_out = [&](const auto& source, const Terms<A>& terms) {
    if (o.gradient) write_gradient<T, C>(g, p, aligned_alike(z, out) ? s : by_element(s), source, terms, target, out);
  };
  if constexpr (C == RowClass::stream) {
    read_inputs();
    const InGlobal<T> source{z};
    write_out(source, finish(reduce_stream<T, C>(g, p, s, source)));
  } else {
    const InShared<T> source = hold<T, C>(g, s, z, shared_of(g, held_vectors<T>(p.rows.classes, g.parts)));
    read_inputs();
    await_copies(g);
    write_out(source, finish(reduce_held<T, C>(g, p, s, source)));
  }
  g.sync_parts();
}

template <typename A>
__device__ __forceinline__ double scale_of(const Rows& rows, const BackwardOutputs& o, int64_t row) {
  if (o.row_grad) return at_or<A>(o.row_grad, row, 0.0);
  return at_or<A>(o.grad, 0, 0.0) / at_or<A>(rows.statistics, stat_denominator * rows.rows + row, 1.0);
}

template <typename T, RowClass C>
__global__ void __launch_bounds__(threads_of(C), blocks_of(C, sizeof(T)))
    backward_wide(const DeviceRows p, const BackwardOutputs o) {
  using A = acc_t<T>;
  SYNKERN_SHARED(Shared<A>, shared);
  if (o.unless_one && *static_cast<const A*>(o.grad) == A(1)) return;
  const Group<A, C> g(shared.slots);
  if (g.row >= p.rows.rows) return;
  const int64_t target = target_at(p.rows, g.row);
  T* out = static_cast<T*>(o.gradient) + g.row * p.rows.classes;
  const LeftOut out_of_loss = left_out(p.rows, g.row, target);
  if (out_of_loss.left_out) {
    if (o.grad_weight && g.leader()) static_cast<A*>(o.grad_weight)[g.row] = A(out_of_loss.fill);
    return fill_row<T, C>(g, out, p.rows.classes, out_of_loss.fill);
  }
  const T* z = row_of<T>(p.rows.logits, p.rows.logits_stride, g.row);
  Terms<A> terms{};
  if (g.leading_warp()) {
    const RowInputs in = row_inputs<T>(p, g.row, target);
    const RowContext c = context_of<A>(p, target, in, saved_statistics<A>(p.rows, g.row));
    const double scale = scale_of<A>(p.rows, o, g.row);
    if (o.grad_weight && g.leader()) static_cast<A*>(o.grad_weight)[g.row] = A(scale * c.value);
    terms = gradient_of<A>(c, scale * in.weight);
  }
  terms = share(g, shared.terms, terms);
  const Span s = span_of(out, p.rows.classes, g.part, g.parts);
  write_gradient<T, C>(g, p, aligned_alike(z, out) ? s : by_element(s), InGlobal<T>{z}, terms, target, out);
}

// <e^(z - max), v> and sum cw v over the own elements
template <typename T, typename Source>
__device__ __forceinline__ Sums own_products(const DeviceRows& p, const Span& s, int rank, int size, const Source& z,
                                             const Source& v, acc_t<T> max) {
  using A = acc_t<T>;
  double sum = 0;
  for_own<T>(s, rank, size, [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    A x[n], y[n], part = 0;
    z.read(j, x);
    v.read(j, y);
    for (int i = 0; i < n; ++i) part += exp_nonpositive(x[i] - max) * y[i];
    sum += double(part);
  });
  const bool smooth = p.rows.loss.label_smoothing != 0.0;
  return {sum, smooth ? own_weighted_sum<T>(s, rank, size, v, A(0), class_weights<A>(p)) : 0.0, 0.0};
}

template <typename T, RowClass C>
__global__ void __launch_bounds__(threads_of(C), blocks_of(C, sizeof(T)))
    tangent_wide(const DeviceRows p, const TangentOutputs o) {
  using A = acc_t<T>;
  SYNKERN_SHARED(Slots<A>, slots);
  const Group<A, C> g(slots);
  if (g.row >= p.rows.rows) return;
  const int64_t target = target_at(p.rows, g.row);
  const LeftOut out_of_loss = left_out(p.rows, g.row, target);
  const double k = at_or<A>(o.coefficient, g.row, 1.0);
  A* directional = static_cast<A*>(o.directional) + g.row;
  if (out_of_loss.left_out || k == 0.0) {
    if (g.leader()) *directional = A(out_of_loss.fill);
    return;
  }
  const T *z = row_of<T>(p.rows.logits, p.rows.logits_stride, g.row), *v = row_of<T>(o.v, o.v_stride, g.row);
  const Span s = span_of(z, p.rows.classes, 0, 1);
  const RowStatistics statistics = saved_statistics<A>(p.rows, g.row);
  RowInputs in{};
  double v_y = 0.0;
  if (g.leader()) in = row_inputs<T>(p, g.row, target), v_y = double(load(v[target]));
  const Sums sums = g.sum(own_products<T>(p, aligned_alike(z, v) ? s : by_element(s), g.rank, g.size, InGlobal<T>{z},
                                          InGlobal<T>{v}, A(statistics.max)));
  if (!g.leader()) return;
  const RowContext c = context_of<A>(p, target, in, statistics);
  *directional = c.flat ? A(0) : A(k * directional_derivative(c, v_y, sums.x * c.inverse_sum, sums.y));
}

// By the leading warp: the terms of a row of the product, whose derivative along v the leader writes.
template <typename T>
__device__ __forceinline__ Terms<acc_t<T>> hvp_of(const RowContext& c, double v_y, const Sums& sums, double k,
                                                  double extra) {
  using A = acc_t<T>;
  if (k == 0.0 || c.flat) return gradient_of<A>(c, extra);
  const HvpTerms h = hvp_terms(c, v_y, sums.x * c.inverse_sum, k, extra);
  return {A(c.max), A(h.alpha), A(h.beta), A(h.kappa), A(h.at_target), false};
}

template <typename T, RowClass C, typename Source>
__device__ __forceinline__ void write_hvp(const Group<acc_t<T>, C>& g, const DeviceRows& p, const Span& s,
                                          const Source& z, const Source& v, const Terms<acc_t<T>>& t, int64_t target,
                                          T* out) {
  using A = acc_t<T>;
  if (t.beta == A(0)) return write_gradient<T, C>(g, p, s, z, t, target, out);
  const A* class_weight = class_weights<A>(p);
  for_own<T>(s, g.rank, g.size, [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    A x[n], y[n];
    z.read(j, x);
    v.read(j, y);
    for (int i = 0; i < n; ++i) x[i] = exp_nonpositive(x[i] - t.max) * (t.alpha + t.beta * y[i]);
    if (t.kappa != A(0))
      for (int i = 0; i < n; ++i) x[i] += class_term(t, class_weight, j + i);
    write(out + j, x);
  });
  write_target(g, s, target, t.at_target, out);
}

template <typename T, RowClass C>
__global__ void __launch_bounds__(threads_of(C), blocks_of(C, sizeof(T)))
    hvp_wide(const DeviceRows p, const HvpOutputs o) {
  using A = acc_t<T>;
  if constexpr (C == RowClass::cluster && !has_clusters) return;
  SYNKERN_SHARED(Shared<A>, shared);
  const Group<A, C> g(shared.slots);
  if (g.row >= p.rows.rows) return;
  const int64_t target = target_at(p.rows, g.row);
  T* out = static_cast<T*>(o.out) + g.row * p.rows.classes;
  const LeftOut out_of_loss = left_out(p.rows, g.row, target);
  if (out_of_loss.left_out) {
    if (g.leader()) static_cast<A*>(o.directional)[g.row] = A(out_of_loss.fill);
    return fill_row<T, C>(g, out, p.rows.classes, out_of_loss.fill);
  }
  const T *z = row_of<T>(p.rows.logits, p.rows.logits_stride, g.row), *v = row_of<T>(o.v, o.v_stride, g.row);
  RowInputs& in = inputs_of(g, shared);
  const auto read_inputs = [&] {
    if (!g.leading_warp()) return;
    if (g.rank == 0) {
      in = row_inputs<T>(p, g.row, target);
      in.v_y = double(load(v[target]));
    }
    sync_warp();
  };
  const auto run = [&](const Span& s, const auto& held_z, const auto& held_v) {
    const RowStatistics statistics = saved_statistics<A>(p.rows, g.row);
    const Sums sums = g.sum(own_products<T>(p, s, g.rank, g.size, held_z, held_v, A(statistics.max)));
    Terms<A> terms{};
    if (g.leading_warp()) {
      const RowContext c = context_of<A>(p, target, in, statistics);
      if (g.leader())
        static_cast<A*>(o.directional)[g.row] =
            c.flat ? A(0) : A(directional_derivative(c, in.v_y, sums.x * c.inverse_sum, sums.y));
      terms = hvp_of<T>(c, in.v_y, sums, at_or<A>(o.coefficient, g.row, 1.0), at_or<A>(o.extra, g.row, 0.0));
    }
    write_hvp<T, C>(g, p, s, held_z, held_v, share(g, shared.terms, terms), target, out);
  };
  const Span s = span_of(z, p.rows.classes, g.part, g.parts);
  if constexpr (C == RowClass::stream) {
    read_inputs();
    run(aligned_alike(z, v) && aligned_alike(z, out) ? s : by_element(s), InGlobal<T>{z}, InGlobal<T>{v});
  } else {  // the launcher takes these only where all three are aligned alike
    const int64_t each = held_vectors<T>(p.rows.classes, g.parts);
    uint4* to = shared_of(g, 2 * each);
    const InShared<T> held_z = hold<T, C>(g, s, z, to), held_v = hold<T, C>(g, s, v, to + each);
    read_inputs();
    await_copies(g);
    run(s, held_z, held_v);
  }
  g.sync_parts();
}

// ---- Kernels for rows of at most small_classes: 1 to 16 lanes a row, which keep it in registers -----------------------

constexpr int small_elements = 8;    // of a row that a lane has
constexpr int64_t small_classes = 128;
constexpr int small_threads = 256;

// Lanes that share a row: a power of two.
__host__ __device__ __forceinline__ int small_lanes(int64_t classes) {
  int lanes = 1;
  while (int64_t(lanes) * small_elements < classes) lanes *= 2;
  return lanes;
}

// The rows of a thread: f(row, valid), called equally often by every thread, so that all take part in shuffles.
template <typename F>
__device__ __forceinline__ void for_small_rows(int64_t rows, int lanes, const F& f) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = int64_t(gridDim.x) * blockDim.x / lanes;
  for (int64_t first = 0; first < rows; first += groups) {
    const int64_t row = first + thread / lanes;
    f(row, row < rows);
  }
}

template <typename T>
struct SmallRow {
  using A = acc_t<T>;
  int64_t classes;
  int lane, lanes;

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < small_elements; ++i) {
      const int j = lane + i * lanes;
      if (j < classes) f(i, j);
    }
  }
  // Elements beyond the row, and all of them where it is not wanted, are `otherwise`.
  __device__ __forceinline__ void read(const T* row, bool wanted, A otherwise, A (&x)[small_elements]) const {
#pragma unroll
    for (int i = 0; i < small_elements; ++i) {
      const int j = lane + i * lanes;
      x[i] = wanted && j < classes ? A(load(read_only(row + j))) : otherwise;
    }
  }
  __device__ __forceinline__ void fill(T* out, double value) const {
    each([&](int, int j) { store(A(value), out + j); });
  }
};

template <typename T>
__device__ __forceinline__ RowStatistics reduce_small(const SmallRow<T>& r, const DeviceRows& p,
                                                      const acc_t<T> (&x)[small_elements]) {
  using A = acc_t<T>;
  A m = x[0];
#pragma unroll
  for (int i = 1; i < small_elements; ++i) m = max_nan(m, x[i]);
  m = max_over_lanes(m, r.lanes);
  A part = 0;
  Sums sums{};
#pragma unroll
  for (int i = 0; i < small_elements; ++i) {
    const A e = exp_nonpositive(x[i] - m);
    if (x[i] == m)
      sums.y += 1.0;
    else
      part += e;
  }
  sums.x = double(part);
  if (p.rows.loss.label_smoothing != 0.0) {
    const A* class_weight = class_weights<A>(p);
    r.each([&](int i, int j) { sums.z += double((class_weight ? class_weight[j] : A(1)) * (x[i] - m)); });
  }
  return statistics_of(m, sum_over_lanes(sums, r.lanes));
}

// out = e^(z - max) (alpha + beta v) + kappa cw; v may be null where beta is 0
template <typename T>
__device__ __forceinline__ void write_small(const SmallRow<T>& r, const DeviceRows& p,
                                            const acc_t<T> (&x)[small_elements], const acc_t<T>* v,
                                            const Terms<acc_t<T>>& t, int64_t target, T* out) {
  using A = acc_t<T>;
  if (t.zero) return r.fill(out, 0.0);
  r.each([&](int i, int j) {
    A y = exp_nonpositive(x[i] - t.max) * (t.beta == A(0) ? t.alpha : t.alpha + t.beta * v[i]);
    if (t.kappa != A(0)) y += class_term(t, class_weights<A>(p), j);
    store(j == target ? t.at_target : y, out + j);
  });
}

template <typename T>
__global__ void __launch_bounds__(small_threads) forward_small(const DeviceRows p, const ForwardOutputs o) {
  using A = acc_t<T>;
  SYNKERN_SHARED(BlockSlots, kept_slots);
  SYNKERN_SHARED(BlockSlots, loss_slots);
  const int lanes = small_lanes(p.rows.classes);
  const SmallRow<T> r{p.rows.classes, int(threadIdx.x) % lanes, lanes};
  double denominator = 1.0;
  if (!o.alone)
    denominator = value_of(o.denominator);
  else if (o.mean)
    denominator = sum_over_block(sum_of_kept_weights<A>(p.rows, 0, p.rows.rows), kept_slots);
  A* losses = static_cast<A*>(o.losses);
  for_small_rows(p.rows.rows, lanes, [&](int64_t row, bool valid) {
    const int64_t target = valid ? target_at(p.rows, row) : p.rows.ignore_index;
    const LeftOut out_of_loss = left_out(p.rows, row, target);
    const bool kept = !out_of_loss.left_out;
    A x[small_elements];
    r.read(row_of<T>(p.rows.logits, p.rows.logits_stride, row), kept, -A(INFINITY), x);
    RowStatistics s = reduce_small(r, p, x);
    if (!valid) return;
    double value = out_of_loss.fill, loss = out_of_loss.fill, ratio = out_of_loss.fill;
    T* out = static_cast<T*>(o.gradient) + row * p.rows.classes;
    if (kept) {
      const RowInputs in = row_inputs<T>(p, row, target);
      const RowContext c = context_of<A>(p, target, in, s);
      value = c.value, loss = weighted_value(c, in.weight), ratio = c.ratio;
      if (o.gradient) write_small(r, p, x, nullptr, gradient_of<A>(c, in.weight / denominator), target, out);
    } else {
      s = {out_of_loss.fill, out_of_loss.fill, out_of_loss.fill};
      if (o.gradient) r.fill(out, out_of_loss.fill);
    }
    if (r.lane != 0) return;
    save_statistics<A>(p.rows, row, s, ratio);
    static_cast<A*>(p.rows.statistics)[stat_denominator * p.rows.rows + row] = A(denominator);
    losses[row] = A(loss);
    if (o.grad_weight) static_cast<A*>(o.grad_weight)[row] = A(value / denominator);
  });
  if (!o.loss) return;  // only set where this block is alone
  sync_block();
  const double sum = sum_over_block(sum_of_losses(losses, 0, p.rows.rows), loss_slots);
  if (threadIdx.x == 0) *static_cast<A*>(o.loss) = A(sum / denominator);
}

template <typename T>
__global__ void __launch_bounds__(small_threads) backward_small(const DeviceRows p, const BackwardOutputs o) {
  using A = acc_t<T>;
  if (o.unless_one && *static_cast<const A*>(o.grad) == A(1)) return;
  const int lanes = small_lanes(p.rows.classes);
  const SmallRow<T> r{p.rows.classes, int(threadIdx.x) % lanes, lanes};
  for_small_rows(p.rows.rows, lanes, [&](int64_t row, bool valid) {
    if (!valid) return;
    const int64_t target = target_at(p.rows, row);
    const LeftOut out_of_loss = left_out(p.rows, row, target);
    T* out = static_cast<T*>(o.gradient) + row * p.rows.classes;
    double grad_weight = out_of_loss.fill;
    if (out_of_loss.left_out) {
      r.fill(out, out_of_loss.fill);
    } else {
      const RowInputs in = row_inputs<T>(p, row, target);
      const RowContext c = context_of<A>(p, target, in, saved_statistics<A>(p.rows, row));
      const double scale = scale_of<A>(p.rows, o, row);
      grad_weight = scale * c.value;
      A x[small_elements];
      r.read(row_of<T>(p.rows.logits, p.rows.logits_stride, row), true, A(0), x);
      write_small(r, p, x, nullptr, gradient_of<A>(c, scale * in.weight), target, out);
    }
    if (o.grad_weight && r.lane == 0) static_cast<A*>(o.grad_weight)[row] = A(grad_weight);
  });
}

// The row's <e^(z - max), v> and sum cw v
template <typename T>
__device__ __forceinline__ Sums small_products(const SmallRow<T>& r, const DeviceRows& p,
                                               const acc_t<T> (&x)[small_elements],
                                               const acc_t<T> (&v)[small_elements], acc_t<T> max) {
  using A = acc_t<T>;
  Sums sums{};
  A part = 0;
  r.each([&](int i, int) { part += exp_nonpositive(x[i] - max) * v[i]; });
  sums.x = double(part);
  if (p.rows.loss.label_smoothing != 0.0) {
    const A* class_weight = class_weights<A>(p);
    r.each([&](int i, int j) { sums.y += double((class_weight ? class_weight[j] : A(1)) * v[i]); });
  }
  return sum_over_lanes(sums, r.lanes);
}

template <typename T>
__global__ void __launch_bounds__(small_threads) tangent_small(const DeviceRows p, const TangentOutputs o) {
  using A = acc_t<T>;
  const int lanes = small_lanes(p.rows.classes);
  const SmallRow<T> r{p.rows.classes, int(threadIdx.x) % lanes, lanes};
  for_small_rows(p.rows.rows, lanes, [&](int64_t row, bool valid) {
    const int64_t target = valid ? target_at(p.rows, row) : p.rows.ignore_index;
    const LeftOut out_of_loss = left_out(p.rows, row, target);
    const bool kept = !out_of_loss.left_out;
    const RowStatistics statistics = kept ? saved_statistics<A>(p.rows, row) : RowStatistics{};
    A x[small_elements], v[small_elements];
    r.read(row_of<T>(p.rows.logits, p.rows.logits_stride, row), kept, A(0), x);
    const T* v_row = row_of<T>(o.v, o.v_stride, row);
    r.read(v_row, kept, A(0), v);
    const Sums sums = small_products(r, p, x, v, A(statistics.max));
    if (!valid || r.lane != 0) return;
    double result = out_of_loss.fill;
    const double k = at_or<A>(o.coefficient, row, 1.0);
    if (kept && k != 0.0) {
      const RowContext c = context_of<A>(p, target, row_inputs<T>(p, row, target), statistics);
      if (!c.flat)
        result = k * directional_derivative(c, double(load(v_row[target])), sums.x * c.inverse_sum, sums.y);
    }
    static_cast<A*>(o.directional)[row] = A(result);
  });
}

template <typename T>
__global__ void __launch_bounds__(small_threads) hvp_small(const DeviceRows p, const HvpOutputs o) {
  using A = acc_t<T>;
  const int lanes = small_lanes(p.rows.classes);
  const SmallRow<T> r{p.rows.classes, int(threadIdx.x) % lanes, lanes};
  for_small_rows(p.rows.rows, lanes, [&](int64_t row, bool valid) {
    const int64_t target = valid ? target_at(p.rows, row) : p.rows.ignore_index;
    const LeftOut out_of_loss = left_out(p.rows, row, target);
    const bool kept = !out_of_loss.left_out;
    const RowStatistics statistics = kept ? saved_statistics<A>(p.rows, row) : RowStatistics{};
    A x[small_elements], v[small_elements];
    r.read(row_of<T>(p.rows.logits, p.rows.logits_stride, row), kept, A(0), x);
    const T* v_row = row_of<T>(o.v, o.v_stride, row);
    r.read(v_row, kept, A(0), v);
    const Sums sums = small_products(r, p, x, v, A(statistics.max));
    if (!valid) return;
    T* out = static_cast<T*>(o.out) + row * p.rows.classes;
    double along = out_of_loss.fill;
    if (kept) {
      const RowContext c = context_of<A>(p, target, row_inputs<T>(p, row, target), statistics);
      const double v_y = double(load(v_row[target]));
      if (!c.flat) along = directional_derivative(c, v_y, sums.x * c.inverse_sum, sums.y);
      const double k = at_or<A>(o.coefficient, row, 1.0), extra = at_or<A>(o.extra, row, 0.0);
      write_small(r, p, x, v, hvp_of<T>(c, v_y, sums, k, extra), target, out);
    } else {
      r.fill(out, out_of_loss.fill);
    }
    if (r.lane == 0) static_cast<A*>(o.directional)[row] = A(along);
  });
}

}  // namespace synkern
