// The row kernels of one element type, SYNKERN_ELEMENT: which of them takes a row of which size, and its launch.
#include "cuda/row_kernels.cuh"

namespace synkern {
namespace {

using T = SYNKERN_ELEMENT;

// float64 is for checking derivatives: one kernel for rows of every size.
constexpr bool checking = sizeof(T) == 8;
constexpr int64_t warp_row_bytes = 4096;  // up to 8 vectors a lane
constexpr int most_parts = 8;

struct Plan {
  RowClass row_class;
  Shape shape;
};

int threads_for(int64_t bytes) { return bytes <= 8192 ? 128 : bytes <= 80 * 1024 ? 256 : most_threads; }

Plan stream_plan(const Rows& r) {
  return {RowClass::stream, {r.rows, threads_for(r.classes * int64_t(sizeof(T)))}};
}

// Rows kept on chip: a third of an SM's shared memory a block, so that one block's loads run beside another's
// arithmetic; what is longer is split over a cluster, or over the whole of it.
Plan held_plan(const Rows& r, int operands, const Device& device) {
  if (checking) return stream_plan(r);
  const auto bytes = [&](int parts) { return held_vectors<T>(r.classes, parts) * 16 * operands; };
  if (r.classes * int64_t(sizeof(T)) <= warp_row_bytes)
    return {RowClass::warp,
            {ceil_div(r.rows, warp_class_rows), threads_of(RowClass::warp), warp_class_rows * bytes(1)}};
  constexpr int64_t least = 16 * 1024;  // a smaller part is all latency
  int parts = 1;
  if (device.clusters) {
    while (parts < most_parts && bytes(parts) > device.shared_bytes / 3) parts *= 2;
    while (parts < most_parts && r.rows * parts * 2 <= device.multiprocessors && bytes(2 * parts) >= least) parts *= 2;
  }
  if (bytes(parts) > device.shared_bytes) return stream_plan(r);
  return {parts > 1 ? RowClass::cluster : RowClass::block, {r.rows, threads_for(bytes(parts)), bytes(parts), parts}};
}

// Rows read once from memory: a warp or a block each; `part_bytes` of a row a block where the parts are independent.
Plan direct_plan(const Rows& r, int64_t part_bytes, const Device& device) {
  const int64_t bytes = r.classes * int64_t(sizeof(T));
  if (!checking && bytes <= warp_row_bytes)
    return {RowClass::warp, {ceil_div(r.rows, warp_class_rows), threads_of(RowClass::warp)}};
  Shape shape{r.rows, threads_for(smaller(bytes, part_bytes))};
  const int64_t to_fill = ceil_div(4 * device.multiprocessors, r.rows), least = 16 * 1024;
  if (part_bytes < bytes)
    shape.parts = int(smaller(UINT16_MAX, smaller(ceil_div(bytes, least),
                                                  to_fill > ceil_div(bytes, part_bytes) ? to_fill
                                                                                        : ceil_div(bytes, part_bytes))));
  return {RowClass::block, shape};
}

bool is_small(const Rows& r) { return !checking && r.classes <= small_classes; }

// Some rounds of one block, which then needs no other launch, or enough blocks to fill the device.
bool alone(const Rows& r) {
  constexpr int64_t most_rounds = 4;
  return is_small(r) && r.rows <= most_rounds * (small_threads / small_lanes(r.classes));
}

Shape small_shape(const Rows& r, const Device& device) {
  if (alone(r)) return {1, small_threads};
  const int64_t blocks = ceil_div(r.rows, small_threads / small_lanes(r.classes));
  return {smaller(blocks, 16 * device.multiprocessors), small_threads};
}

#define SYNKERN_WITH_DEVICE                             \
  Device device;                                        \
  if (const cudaError_t error = current_device(device)) \
    return error;

cudaError_t forward(const DeviceRows& p, const ForwardOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  if constexpr (!checking) {
    if (is_small(p.rows)) return launch(forward_small<T>, small_shape(p.rows, device), stream, p, o);
    const Plan plan = held_plan(p.rows, 1, device);
    if (plan.row_class == RowClass::warp) return launch(forward_wide<T, RowClass::warp>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::block) return launch(forward_wide<T, RowClass::block>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::cluster)
      return launch(forward_wide<T, RowClass::cluster>, plan.shape, stream, p, o);
  }
  return launch(forward_wide<T, RowClass::stream>, stream_plan(p.rows).shape, stream, p, o);
}

cudaError_t backward(const DeviceRows& p, const BackwardOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  constexpr int64_t part_bytes = 64 * 1024;
  const Plan plan = direct_plan(p.rows, part_bytes, device);
  if constexpr (!checking) {
    if (is_small(p.rows)) return launch(backward_small<T>, small_shape(p.rows, device), stream, p, o);
    if (plan.row_class == RowClass::warp) return launch(backward_wide<T, RowClass::warp>, plan.shape, stream, p, o);
  }
  return launch(backward_wide<T, RowClass::block>, plan.shape, stream, p, o);
}

cudaError_t tangent(const DeviceRows& p, const TangentOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  const Plan plan = direct_plan(p.rows, INT64_MAX, device);
  if constexpr (!checking) {
    if (is_small(p.rows)) return launch(tangent_small<T>, small_shape(p.rows, device), stream, p, o);
    if (plan.row_class == RowClass::warp) return launch(tangent_wide<T, RowClass::warp>, plan.shape, stream, p, o);
  }
  return launch(tangent_wide<T, RowClass::block>, plan.shape, stream, p, o);
}

// Whether every row of the three matrices starts at the same place of a 16-byte line.
bool aligned_alike(const Rows& r, const HvpOutputs& o) {
  const auto same = [&](const void* x, int64_t stride) {
    return synkern::aligned_alike(static_cast<const char*>(x), static_cast<const char*>(o.out)) &&
           (stride - r.classes) * int64_t(sizeof(T)) % 16 == 0;
  };
  return same(r.logits, r.logits_stride) && same(o.v, o.v_stride);
}

cudaError_t hvp(const DeviceRows& p, const HvpOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  if constexpr (!checking) {
    if (is_small(p.rows)) return launch(hvp_small<T>, small_shape(p.rows, device), stream, p, o);
    const Plan plan = aligned_alike(p.rows, o) ? held_plan(p.rows, 2, device) : stream_plan(p.rows);
    if (plan.row_class == RowClass::warp) return launch(hvp_wide<T, RowClass::warp>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::block) return launch(hvp_wide<T, RowClass::block>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::cluster) return launch(hvp_wide<T, RowClass::cluster>, plan.shape, stream, p, o);
  }
  return launch(hvp_wide<T, RowClass::stream>, stream_plan(p.rows).shape, stream, p, o);
}

}  // namespace

#define SYNKERN_NAME_(name, element) name##element
#define SYNKERN_NAME(name, element) SYNKERN_NAME_(name, element)
extern const RowLaunchers SYNKERN_NAME(row_launchers_, SYNKERN_ELEMENT);
const RowLaunchers SYNKERN_NAME(row_launchers_, SYNKERN_ELEMENT) = {alone, forward, backward, tangent, hvp};

}  // namespace synkern
