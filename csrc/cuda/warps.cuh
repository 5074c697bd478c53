// What kernels with one warp, or a part of one, per row share. All sums have a fixed order.
#pragma once

#include "bf16.h"
#include "cuda/launch.cuh"

namespace fastwm {

constexpr int kWarpThreads = 32;

// for (int64_t row : each row of this warp); the same row in all lanes, so they stay together
#define FWM_WARP_STRIDE(row, rows)                                                                 \
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads; \
       row < (rows); row += static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpThreads)

// for (int64_t i : each column of this lane)
#define FWM_LANE_STRIDE(i, count) \
  for (int64_t i = threadIdx.x % kWarpThreads; i < (count); i += kWarpThreads)

inline unsigned blocks_for_warps(int64_t warps) { return blocks_for(warps * kWarpThreads); }

// Over `width` neighbouring lanes, a power of two; every lane gets the result.
__device__ __forceinline__ float lanes_sum(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ float lanes_max(float x, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

__device__ __forceinline__ int warp_count(int x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

}  // namespace fastwm
