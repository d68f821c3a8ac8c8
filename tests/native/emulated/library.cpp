// The device kernels on a processor, as a library of C functions for tests.
#include "cuda/intrinsics.cuh"

#include "cuda/contraction.h"
#include "cuda/rows.h"

namespace synkern {
Device emulated_device{132, 220 * 1024, true};
std::vector<Shape> launches;
}  // namespace synkern

using namespace synkern;

// Every operand of every operator; what one does not use is null.
struct Call {
  const void *logits, *target, *weight, *ratio, *class_weight;
  void* statistics;
  int64_t logits_stride, dtype, target_type, rows, classes, ignore_index, loss, reduction;
  double p0, p1, p2, label_smoothing, z_loss;
  void *losses, *total, *gradient, *grad_weight;
  const void *grad, *v, *coefficient, *extra;
  int64_t v_stride;
};

namespace {

DeviceRows rows_of(const Call& c, double* scratch) {
  DeviceRows p{};
  p.rows.logits = c.logits;
  p.rows.logits_stride = c.logits_stride;
  p.rows.dtype = DType(c.dtype);
  p.rows.target = c.target;
  p.rows.target_type = IndexType(c.target_type);
  p.rows.rows = c.rows;
  p.rows.classes = c.classes;
  p.rows.ignore_index = c.ignore_index;
  p.rows.weight = c.weight;
  p.rows.ratio = c.ratio;
  p.rows.class_weight = c.class_weight;
  p.rows.loss = {LossKind(c.loss), c.p0, c.p1, c.p2, c.label_smoothing, c.z_loss};
  p.rows.statistics = c.statistics;
  take_class_weights(p, scratch, nullptr);
  return p;
}

}  // namespace

extern "C" {

void emulated_configure(int multiprocessors, int64_t shared_bytes, int clusters) {
  emulated_device = {multiprocessors, shared_bytes, clusters != 0};
  launches.clear();
}

// The launches since the last configuration: blocks, threads, cluster and parts of each.
int64_t emulated_launches(int64_t* out, int64_t most) {
  for (int64_t i = 0; i < int64_t(launches.size()) && i < most; ++i) {
    const Shape& shape = launches[size_t(i)];
    const int64_t numbers[] = {shape.blocks, shape.threads, shape.cluster, shape.parts};
    std::copy(numbers, numbers + 4, out + 4 * i);
  }
  return int64_t(launches.size());
}

int emulated_forward(const Call* c) {
  std::vector<double> scratch(scratch_numbers, NAN);
  return run_forward(rows_of(*c, scratch.data()),
                     {Reduction(c->reduction), c->losses, c->gradient, c->grad_weight, c->total, scratch.data()},
                     nullptr);
}

int emulated_rescale(const Call* c) {
  std::vector<double> scratch(scratch_numbers, NAN);
  return run_rescale(rows_of(*c, scratch.data()), c->grad, c->gradient, c->grad_weight, nullptr);
}

int emulated_backward(const Call* c) {
  std::vector<double> scratch(scratch_numbers, NAN);
  const bool by_row = Reduction(c->reduction) == Reduction::none;
  return row_launchers(DType(c->dtype))
      .backward(rows_of(*c, scratch.data()),
                {by_row ? c->grad : nullptr, by_row ? nullptr : c->grad, false, c->gradient, c->grad_weight}, nullptr);
}

int emulated_tangent(const Call* c) {
  std::vector<double> scratch(scratch_numbers, NAN);
  return row_launchers(DType(c->dtype))
      .tangent(rows_of(*c, scratch.data()), {c->v, c->v_stride, c->coefficient, c->losses}, nullptr);
}

int emulated_hvp(const Call* c) {
  std::vector<double> scratch(scratch_numbers, NAN);
  return row_launchers(DType(c->dtype))
      .hvp(rows_of(*c, scratch.data()), {c->v, c->v_stride, c->coefficient, c->extra, c->gradient, c->losses},
           nullptr);
}

// Operands of the contractions; what one does not use is null or 0. An embedding's index is `a`.
struct Layer {
  int64_t dtype, v_dtype, rows, samples, inputs, outputs, entries, a_stride, b_stride, v_stride;
  const void *a, *b, *v, *v_bias, *mean, *rstd, *sample;
  void* out;
};

int emulated_linear(const Layer* c) {
  const DeviceLinear layer{DType(c->dtype), DType(c->v_dtype), c->a, c->b, c->v, c->v_bias,
                           c->a_stride, c->b_stride, c->v_stride, c->inputs, c->outputs};
  std::vector<double> partials(size_t(partials_of(layer, c->rows)), NAN);
  return run_linear(layer, {static_cast<const int64_t*>(c->sample), c->samples, c->rows}, partials.data(), c->out,
                    nullptr);
}

int emulated_embedding(const Layer* c) {
  const DeviceEmbedding layer{DType(c->dtype), static_cast<const int64_t*>(c->a), c->b, c->v,
                              c->b_stride, c->v_stride, c->outputs, c->entries};
  std::vector<double> partials(size_t(c->rows), NAN);
  return run_embedding(layer, {static_cast<const int64_t*>(c->sample), c->samples, c->rows}, partials.data(), c->out,
                       nullptr);
}

int emulated_norm(const Layer* c) {
  const DeviceNorm layer{DType(c->dtype), c->a, c->b, c->mean, c->rstd, c->v, c->v_bias,
                         c->a_stride, c->b_stride, c->outputs};
  std::vector<double> partials(size_t(c->rows), NAN);
  return run_norm(layer, {static_cast<const int64_t*>(c->sample), c->samples, c->rows}, partials.data(), c->out,
                  nullptr);
}

}  // extern "C"
