// The pointwise half of the dense GRU step of 2023 on the GPU. Arguments are those of the CPU kernel,
// with device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/rssm_layernorm.h"

namespace fastwm::cuda {

cudaError_t gru_layernorm(const GruLayerNorm& a, float* out, int64_t rows, cudaStream_t stream);

// Ranges of rows whose sums are added in order.
int64_t gru_layernorm_ranges(int64_t rows);
struct GruLayerNormGrads {
  float *parts, *scale, *shift, *deter;
  float* moments;  // scratch (N, 4)
  float* sums;     // scratch (ranges, 2, 3D)
};
cudaError_t gru_layernorm_backward(const GruLayerNorm& a, const GruLayerNormGrads& to,
                                   int64_t rows, cudaStream_t stream);

}  // namespace fastwm::cuda
