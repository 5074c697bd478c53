// What the CUDA kernels share: grid sizes, loops, reductions. No torch: a launcher takes the
// stream, never synchronises, and returns cudaGetLastError() for the binding to raise.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastwm {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks for one thread per element. Beyond 2^31 - 1 blocks the grid-stride loop takes over.
inline unsigned blocks_for(int64_t elements, int threads = kThreads) {
  const int64_t blocks = (elements + threads - 1) / threads;
  constexpr int64_t kMost = 0x7fffffff;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

// for (int64_t i : each element this thread owns)
#define FWM_GRID_STRIDE(i, n)                                                            \
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (n); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

// Sum and maximum over the 32 lanes of a warp; every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

}  // namespace fastwm
