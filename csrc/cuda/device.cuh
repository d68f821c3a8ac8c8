// What the kernels are built from: vectors of elements, a row's share of a thread, and reductions over the threads that
// share a row. Every reduction has one fixed order.
#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "cuda/intrinsics.cuh"

namespace synkern {

// Elements of a 16-byte vector.
template <typename T>
constexpr int width = 16 / int(sizeof(T));

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
__host__ __device__ __forceinline__ int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// e^x for x <= 0 from one 2^h: with h = x log2(e) rounded, e^x = 2^h e^(x - h log 2), and the second factor is 1 plus
// its tiny exponent. 2 ulp, where 2^h alone is off by x's magnitude in ulp. Zero below -127 log 2; so is NaN: rows that
// hold one are found with their maximum.
__device__ __forceinline__ float exp_nonpositive(float x) {
  constexpr float lowest = -88.0296919f, log2_e = 1.44269504f, log_2 = 0.693147182f;
  const float clamped = fmaxf(x, lowest), h = clamped * log2_e, y = exp2_fast(h);
  return fmaf(y, fmaf(-log_2, h, clamped), y);
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& v, acc_t<T> (&x)[width<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < 4; ++i) x[i] = as_float(words[i]);
  } else {
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = load(T{uint16_t(words[i] & 0xffffu)});
      x[2 * i + 1] = load(T{uint16_t(words[i] >> 16)});
    }
  }
}

// n elements at once: 1, or a vector, whose address must be a multiple of 16
template <typename T>
__device__ __forceinline__ void write(T* to, const acc_t<T> (&x)[1]) {
  store(x[0], to);
}
template <typename T>
__device__ __forceinline__ void write(T* to, const acc_t<T> (&x)[width<T>]) {
  if constexpr (std::is_same_v<T, double>) {
    to[0] = x[0];
    to[1] = x[1];
  } else if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<uint4*>(to) = {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
  } else {
    *reinterpret_cast<uint4*>(to) = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                                     pack2<T>(x[6], x[7])};
  }
}

// A row in global memory, read there.
template <typename T>
struct InGlobal {
  const T* row;
  __device__ __forceinline__ void read(int64_t j, acc_t<T> (&x)[1]) const { x[0] = load(read_only(row + j)); }
  __device__ __forceinline__ void read(int64_t j, acc_t<T> (&x)[width<T>]) const {
    if constexpr (std::is_same_v<T, double>) {
      for (int i = 0; i < width<T>; ++i) x[i] = read_only(row + j + i);
    } else {
      unpack<T>(read_only(reinterpret_cast<const uint4*>(row + j)), x);
    }
  }
};

// A block's part of a row in shared memory; element j of the row lies at `at_zero + j`.
template <typename T>
struct InShared {
  const T* base;
  int64_t first;  // the element at base
  __device__ __forceinline__ const T* at(int64_t j) const { return base + int(j - first); }
  __device__ __forceinline__ void read(int64_t j, acc_t<T> (&x)[1]) const { x[0] = load(*at(j)); }
  __device__ __forceinline__ void read(int64_t j, acc_t<T> (&x)[width<T>]) const {
    unpack<T>(*reinterpret_cast<const uint4*>(at(j)), x);
  }
};

// Elements [begin, end) of a row: vectors in [head, tail), single elements before and after.
struct Span {
  int64_t begin, head, tail, end;
};

// Part `part` of `parts` of the row at `row`; its vectors start at multiples of 16 bytes.
template <typename T>
__host__ __device__ __forceinline__ Span span_of(const T* row, int64_t classes, int part, int parts) {
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t first = smaller(misaligned ? width<T> - misaligned : 0, classes);
  const int64_t vectors = (classes - first) / width<T>, share = ceil_div(vectors, parts);
  const int64_t v0 = smaller(part * share, vectors), v1 = smaller(v0 + share, vectors);
  const int64_t head = first + v0 * width<T>, tail = first + v1 * width<T>;
  return {part == 0 ? 0 : head, head, tail, part == parts - 1 ? classes : tail};
}

// The same elements without vectors, for rows whose operands are aligned differently.
__host__ __device__ __forceinline__ Span by_element(const Span& s) { return {s.begin, s.end, s.end, s.end}; }

template <typename T, typename U>
__host__ __device__ __forceinline__ bool aligned_alike(const T* x, const U* y) {
  return reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(y) % 16;
}

// f(count, j) for every piece of the span that thread `rank` of `size` has, count being 1 or a vector's width.
template <typename T, int Unroll = 4, typename F>
__device__ __forceinline__ void for_own(const Span& s, int rank, int size, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Vector = std::integral_constant<int, width<T>>;
#pragma unroll 1
  for (int64_t j = s.begin + rank; j < s.head; j += size) f(One{}, j);
#pragma unroll Unroll
  for (int64_t j = s.head + int64_t(rank) * width<T>; j < s.tail; j += int64_t(size) * width<T>) f(Vector{}, j);
#pragma unroll 1
  for (int64_t j = s.tail + rank; j < s.end; j += size) f(One{}, j);
}

// Which threads share a row, and where the row is kept between its passes.
enum class RowClass {
  warp,     // a warp a row, in shared memory
  block,    // a block a row, in shared memory
  cluster,  // several blocks a row, in their shared memory together
  stream,   // a block a row, which is read again for every pass
};

constexpr int warp_lanes = 32;
constexpr int most_warps = 12;  // of a block: two of them, or three of 8 warps, leave a thread 80 registers
constexpr int most_threads = most_warps * warp_lanes;

struct Sums {
  double x, y, z;
};

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }

template <typename A>
__device__ __forceinline__ A max_over_lanes(A m, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) m = max_nan(m, shuffle_xor(m, step));
  return m;
}
__device__ __forceinline__ double sum_over_lanes(double x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}
__device__ __forceinline__ Sums sum_over_lanes(const Sums& s, int lanes) {
  return {sum_over_lanes(s.x, lanes), sum_over_lanes(s.y, lanes), sum_over_lanes(s.z, lanes)};
}

// One use of each member in a kernel: then a barrier before the reads is all that is needed.
template <typename A>
struct Slots {
  A max[most_warps], block_max;
  Sums sums[most_warps], block_sums;
};

// The threads that share a row.
template <typename A, RowClass C>
struct Group {
  Slots<A>& slots;
  int rank, size, part, parts;
  int64_t row;

  __device__ __forceinline__ explicit Group(Slots<A>& slots_) : slots(slots_) {
    if constexpr (C == RowClass::warp) {
      rank = int(threadIdx.x) % warp_lanes;
      size = warp_lanes;
      row = int64_t(blockIdx.x) * (blockDim.x / warp_lanes) + threadIdx.x / warp_lanes;
    } else {
      rank = int(threadIdx.x);
      size = int(blockDim.x);
      row = blockIdx.x;
    }
    part = int(blockIdx.y);
    parts = int(gridDim.y);
    if constexpr (C == RowClass::cluster) {
      part = cluster_rank();
      parts = cluster_size();
      row /= parts;
    }
  }

  // The warp that computes what the row's threads then share.
  __device__ __forceinline__ bool leading_warp() const { return rank < warp_lanes; }
  // The one thread of all the row's that writes its numbers.
  __device__ __forceinline__ bool leader() const { return rank == 0 && part == 0; }

  __device__ __forceinline__ void sync() const {
    if constexpr (C == RowClass::warp)
      sync_warp();
    else
      sync_block();
  }

  // Once no thread may leave while others read its block's shared memory.
  __device__ __forceinline__ void sync_parts() const {
    if constexpr (C == RowClass::cluster) sync_cluster();
  }

  __device__ __forceinline__ A max(A m) const {
    m = max_over_lanes(m, warp_lanes);
    if constexpr (C != RowClass::warp) m = max_of_warps(m);
    if constexpr (C == RowClass::cluster) {
      if (rank == 0) slots.block_max = m;
      sync_cluster();
      m = *in_block_of_cluster(&slots.block_max, 0);
      for (int i = 1; i < parts; ++i) m = max_nan(m, *in_block_of_cluster(&slots.block_max, i));
    }
    return m;
  }

  __device__ __forceinline__ Sums sum(Sums s) const {
    s = sum_over_lanes(s, warp_lanes);
    if constexpr (C != RowClass::warp) s = sum_of_warps(s);
    if constexpr (C == RowClass::cluster) {
      if (rank == 0) slots.block_sums = s;
      sync_cluster();
      s = *in_block_of_cluster(&slots.block_sums, 0);
      for (int i = 1; i < parts; ++i) s = s + *in_block_of_cluster(&slots.block_sums, i);
    }
    return s;
  }

 private:
  __device__ __forceinline__ A max_of_warps(A m) const {
    if (rank % warp_lanes == 0) slots.max[rank / warp_lanes] = m;
    sync_block();
    m = slots.max[0];
    for (int i = 1; i < size / warp_lanes; ++i) m = max_nan(m, slots.max[i]);
    return m;
  }

  __device__ __forceinline__ Sums sum_of_warps(const Sums& s) const {
    if (rank % warp_lanes == 0) slots.sums[rank / warp_lanes] = s;
    sync_block();
    Sums total = slots.sums[0];
    for (int i = 1; i < size / warp_lanes; ++i) total = total + slots.sums[i];
    return total;
  }
};

}  // namespace synkern
