// Everything the kernels ask of the hardware, and the launch itself: element types, exponential, copies, shuffles,
// clusters. tests/native/emulated holds the same names for a processor, so that the kernels run in tests without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/shape.h"

#define SYNKERN_SHARED(type, name) __shared__ type name

namespace synkern {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool has_clusters = false;
#else
constexpr bool has_clusters = true;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float load(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ void store(float x, float* to) { *to = x; }
__device__ __forceinline__ void store(double x, double* to) { *to = x; }
__device__ __forceinline__ void store(float x, bfloat16* to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
}
__device__ __forceinline__ void store(float x, float16* to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }

// Two 16-bit elements in a word, the first in the low half, as they lie in memory.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack2<bfloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack2<float16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// The larger, or NaN where either is.
__device__ __forceinline__ float max_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}
__device__ __forceinline__ double max_nan(double x, double y) { return x > y || x != x ? x : y; }
template <typename T>
__device__ __forceinline__ uint32_t max2_nan(uint32_t x, uint32_t y);
template <>
__device__ __forceinline__ uint32_t max2_nan<bfloat16>(uint32_t x, uint32_t y) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  return larger;
}
template <>
__device__ __forceinline__ uint32_t max2_nan<float16>(uint32_t x, uint32_t y) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(x), "r"(y));
  return larger;
}

// 2^x to 2 ulp; results below the smallest normal number are zero
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// Through the read-only path, so that loads may be moved above stores; never for what the kernel also writes.
template <typename T>
__device__ __forceinline__ T read_only(const T* p) {
  return *p;
}
__device__ __forceinline__ uint4 read_only(const uint4* p) { return __ldg(p); }
__device__ __forceinline__ float read_only(const float* p) { return __ldg(p); }
__device__ __forceinline__ double read_only(const double* p) { return __ldg(p); }
__device__ __forceinline__ bfloat16 read_only(const bfloat16* p) {
  return {__ldg(reinterpret_cast<const unsigned short*>(p))};
}
__device__ __forceinline__ float16 read_only(const float16* p) {
  return {__ldg(reinterpret_cast<const unsigned short*>(p))};
}

// 16 bytes from global to shared memory without a register in between; the thread that copied may read them after
// copies_done(), others after a barrier. Only the first `bytes` are read, the rest is zero.
__device__ __forceinline__ void copy_async(uint4* shared, const void* global, int bytes = 16) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last `Pending` have arrived.
template <int Pending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 synkern_dynamic_shared[];
  return synkern_dynamic_shared;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Every lane of the warp takes part.
template <typename X>
__device__ __forceinline__ X shuffle_xor(X x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// A cluster is the blocks that share one row and read each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same variable in another block of the cluster.
template <typename X>
__device__ __forceinline__ const X* in_block_of_cluster(const X* mine, int rank) {
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<const X*>(theirs);
}

// Stops the whole launch with an error that the next call into CUDA reports; for builds with SYNKERN_CUDA_DEBUG.
__device__ __forceinline__ void stop_launch() { __trap(); }

// ---- Tensor cores: d += a b, a 16 x 16 by rows, b 16 x 8 by columns. Lane = 4 group + member holds
// a: rows group and group + 8, columns 2 member + {0, 1} and those + 8; b: the same columns as rows, column group;
// d: rows group and group + 8, columns 2 member + {0, 1}.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i; lane 4 group + member
// receives, in word i, elements 2 member and 2 member + 1 of row `group` of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// ---- Host ----------------------------------------------------------------------------------------------------------
using Stream = cudaStream_t;

// The current device; three attribute look-ups, which the runtime answers from memory.
inline cudaError_t current_device(Device& device) {
  int index = 0, shared = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (!error) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
  device.shared_bytes = shared - 4096;  // the kernels' own variables
  device.clusters = clusters != 0;
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, Stream stream, const Arguments&... arguments) {
  if (shape.blocks * shape.cluster > INT32_MAX || shape.parts > UINT16_MAX) return cudaErrorInvalidConfiguration;
  constexpr int64_t without_asking = 48 * 1024 - 4096;
  if (shape.shared_bytes > without_asking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks * shape.cluster), unsigned(shape.parts));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  const cudaError_t last = cudaGetLastError();  // also clears it
  return error ? error : last;
}

}  // namespace synkern
