// The few names of CUDA's own header that the kernels use, for a processor.
#pragma once
#include <cstdint>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
