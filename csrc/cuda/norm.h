// RMSNorm and SiLU on the GPU, x and y of type float or Bf16: see kernels.h.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "bf16.h"

namespace fastwm::cuda {

template <class T>
struct RmsSilu {
  const T* x;          // (N, U)
  const float* scale;  // (U)
  const T* grad_y;     // (N, U), backward
  int64_t rows, features;
  float eps;
};
template <class T>
cudaError_t rms_silu(const RmsSilu<T>& a, T* y, cudaStream_t stream);

// Ranges of rows whose sums are added in order; `parts` (ranges, U) and `inverse` (N) are scratch.
int64_t rms_silu_ranges(int64_t rows);
template <class T>
cudaError_t rms_silu_backward(const RmsSilu<T>& a, T* grad_x, float* grad_scale, float* parts,
                              float* inverse, cudaStream_t stream);

}  // namespace fastwm::cuda
