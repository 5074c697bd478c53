// What kernels with one block per row share. All sums have a fixed order.
#pragma once

#include "bf16.h"
#include "cuda/launch.cuh"

namespace fastwm {

// Sum over the block, the same in every thread. Called by all threads of the block.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[32];
  x = warp_sum(x);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += partial[i];
  return total;
}

constexpr float kRmsEps = 1e-4f;

// 1 / rms of a row of n numbers, each thread having summed the squares of its own.
__device__ __forceinline__ float inverse_rms(float squares, int64_t n) {
  return 1.0f / sqrtf(block_sum(squares) / (float)n + kRmsEps);
}

}  // namespace fastwm
