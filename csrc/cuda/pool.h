// 2x2 max pooling, bias, RMSNorm and SiLU on the GPU, images of type float or Bf16: see kernels.h.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "bf16.h"

namespace fastwm::cuda {

struct PoolSizes {
  int64_t height, width, channels;  // of the image before pooling; odd edges are dropped
  float eps;
};

template <class T>
struct PoolSilu {
  const T* x;          // (N, H, W, C)
  const float* bias;   // (C)
  const float* scale;  // (C)
  int64_t images;
  PoolSizes n;
};
// y, pooled, index: (N, H/2, W/2, C); index, 2 * row + column, says where a pooled number came
// from.
template <class T>
cudaError_t pool_silu(const PoolSilu<T>& a, T* y, T* pooled, uint8_t* index, cudaStream_t stream);

// What follows the norm's backward pass: grad_x (N, H, W, C) and grad_bias (C) from grad, the
// gradient of `pooled`. `parts` (rms_silu_ranges(N * H/2 * W/2), C) is scratch.
template <class T>
cudaError_t pool_spread(const T* grad, const uint8_t* index, int64_t images, const PoolSizes& n,
                        T* grad_x, float* grad_bias, float* parts, cudaStream_t stream);

}  // namespace fastwm::cuda
