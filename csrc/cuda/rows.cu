// The row kernels of one element type, SYNKERN_ELEMENT: which of them takes a row of which size, and its launch.
#include "cuda/row_kernels.cuh"

namespace synkern {
namespace {

// float64 is for checking derivatives: one kernel for rows of every size.
template <typename T>
constexpr bool checking = sizeof(T) == 8;
constexpr int64_t warp_row_bytes = 4096;  // up to 8 vectors a lane
constexpr int64_t least_part = 16 * 1024;  // of a row, in bytes: a smaller one is all latency

struct Plan {
  RowClass row_class;
  Shape shape;
};

int threads_for(int64_t bytes) { return bytes <= 8192 ? 128 : bytes <= 80 * 1024 ? 256 : most_threads; }

template <typename T>
Plan stream_plan(const Rows& r) {
  return {RowClass::stream, {r.rows, threads_for(r.classes * int64_t(sizeof(T)))}};
}

// Rows kept on chip: a third of an SM's shared memory a block, so that one block's loads run beside another's
// arithmetic; what is longer is split over a cluster, or over the whole of it.
template <typename T>
Plan held_plan(const Rows& r, int operands, const Device& device) {
  if (checking<T>) return stream_plan<T>(r);
  const auto bytes = [&](int parts) { return held_vectors<T>(r.classes, parts) * 16 * operands; };
  if (r.classes * int64_t(sizeof(T)) <= warp_row_bytes)
    return {RowClass::warp,
            {ceil_div(r.rows, warp_class_rows), threads_of(RowClass::warp), warp_class_rows * bytes(1)}};
  constexpr int most_parts = 8;
  int parts = 1;
  if (device.clusters) {
    while (parts < most_parts && bytes(parts) > device.shared_bytes / 3) parts *= 2;
    while (parts < most_parts && r.rows * parts * 2 <= device.multiprocessors && bytes(2 * parts) >= least_part) parts *= 2;
  }
  if (bytes(parts) > device.shared_bytes) return stream_plan<T>(r);
  return {parts > 1 ? RowClass::cluster : RowClass::block, {r.rows, threads_for(bytes(parts)), bytes(parts), parts}};
}

// Rows that one pass reads from memory: a warp or a block each, or, where their parts are independent, a block for every
// 64 KB and more blocks where rows are few.
template <typename T>
Plan direct_plan(const Rows& r, bool independent_parts, const Device& device) {
  const int64_t bytes = r.classes * int64_t(sizeof(T));
  if (!checking<T> && bytes <= warp_row_bytes)
    return {RowClass::warp, {ceil_div(r.rows, warp_class_rows), threads_of(RowClass::warp)}};
  if (!independent_parts) return {RowClass::block, {r.rows, threads_for(bytes)}};
  const int64_t by_size = ceil_div(bytes, 64 * 1024), to_fill = ceil_div(4 * device.multiprocessors, r.rows);
  const int64_t parts = smaller(by_size > to_fill ? by_size : to_fill, ceil_div(bytes + 1, least_part));
  Shape shape{r.rows, threads_for(bytes / parts)};
  shape.parts = int(smaller(parts, UINT16_MAX));
  return {RowClass::block, shape};
}

template <typename T>
bool is_small(const Rows& r) { return !checking<T> && r.classes <= small_classes; }

// Some rounds of one block, which then needs no other launch, or enough blocks to fill the device.
template <typename T>
bool alone(const Rows& r) {
  constexpr int64_t most_rounds = 4;
  return is_small<T>(r) && r.rows > 0 && r.rows <= most_rounds * (small_threads / small_lanes(r.classes));
}

template <typename T>
Shape small_shape(const Rows& r, const Device& device) {
  if (alone<T>(r)) return {1, small_threads};
  const int64_t blocks = ceil_div(r.rows, small_threads / small_lanes(r.classes));
  return {smaller(blocks, 16 * device.multiprocessors), small_threads};
}

#define SYNKERN_WITH_DEVICE                             \
  if (p.rows.rows == 0) return cudaSuccess;             \
  Device device;                                        \
  if (const cudaError_t error = current_device(device)) \
    return error;

template <typename T>
cudaError_t forward(const DeviceRows& p, const ForwardOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  if constexpr (!checking<T>) {
    if (is_small<T>(p.rows)) return launch(forward_small<T>, small_shape<T>(p.rows, device), stream, p, o);
    const Plan plan = held_plan<T>(p.rows, 1, device);
    if (plan.row_class == RowClass::warp) return launch(forward_wide<T, RowClass::warp>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::block) return launch(forward_wide<T, RowClass::block>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::cluster)
      return launch(forward_wide<T, RowClass::cluster>, plan.shape, stream, p, o);
  }
  return launch(forward_wide<T, RowClass::stream>, stream_plan<T>(p.rows).shape, stream, p, o);
}

template <typename T>
cudaError_t backward(const DeviceRows& p, const BackwardOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  const Plan plan = direct_plan<T>(p.rows, true, device);
  if constexpr (!checking<T>) {
    if (is_small<T>(p.rows)) return launch(backward_small<T>, small_shape<T>(p.rows, device), stream, p, o);
    if (plan.row_class == RowClass::warp) return launch(backward_wide<T, RowClass::warp>, plan.shape, stream, p, o);
  }
  return launch(backward_wide<T, RowClass::block>, plan.shape, stream, p, o);
}

template <typename T>
cudaError_t tangent(const DeviceRows& p, const TangentOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  const Plan plan = direct_plan<T>(p.rows, false, device);
  if constexpr (!checking<T>) {
    if (is_small<T>(p.rows)) return launch(tangent_small<T>, small_shape<T>(p.rows, device), stream, p, o);
    if (plan.row_class == RowClass::warp) return launch(tangent_wide<T, RowClass::warp>, plan.shape, stream, p, o);
  }
  return launch(tangent_wide<T, RowClass::block>, plan.shape, stream, p, o);
}

// Whether every row of the three matrices starts at the same place of a 16-byte line.
template <typename T>
bool aligned_alike(const Rows& r, const HvpOutputs& o) {
  const auto same = [&](const void* x, int64_t stride) {
    return synkern::aligned_alike(static_cast<const char*>(x), static_cast<const char*>(o.out)) &&
           (stride - r.classes) * int64_t(sizeof(T)) % 16 == 0;
  };
  return same(r.logits, r.logits_stride) && same(o.v, o.v_stride);
}

template <typename T>
cudaError_t hvp(const DeviceRows& p, const HvpOutputs& o, Stream stream) {
  SYNKERN_WITH_DEVICE
  if constexpr (!checking<T>) {
    if (is_small<T>(p.rows)) return launch(hvp_small<T>, small_shape<T>(p.rows, device), stream, p, o);
    const Plan plan = aligned_alike<T>(p.rows, o) ? held_plan<T>(p.rows, 2, device) : stream_plan<T>(p.rows);
    if (plan.row_class == RowClass::warp) return launch(hvp_wide<T, RowClass::warp>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::block) return launch(hvp_wide<T, RowClass::block>, plan.shape, stream, p, o);
    if (plan.row_class == RowClass::cluster) return launch(hvp_wide<T, RowClass::cluster>, plan.shape, stream, p, o);
  }
  return launch(hvp_wide<T, RowClass::stream>, stream_plan<T>(p.rows).shape, stream, p, o);
}

}  // namespace

#define SYNKERN_NAME_(name, element) name##element
#define SYNKERN_NAME(name, element) SYNKERN_NAME_(name, element)
extern const RowLaunchers SYNKERN_NAME(row_launchers_, SYNKERN_ELEMENT);
const RowLaunchers SYNKERN_NAME(row_launchers_, SYNKERN_ELEMENT) = {
    alone<SYNKERN_ELEMENT>, forward<SYNKERN_ELEMENT>, backward<SYNKERN_ELEMENT>, tangent<SYNKERN_ELEMENT>,
    hvp<SYNKERN_ELEMENT>};

}  // namespace synkern
