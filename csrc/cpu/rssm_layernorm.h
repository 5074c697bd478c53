// The pointwise half of the dense GRU step of 2023: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

namespace fastwm {

struct GruLayerNorm {
  const float* parts;  // (N, 3D): reset, candidate and update before the norm
  const float* scale;  // (3D)
  const float* shift;  // (3D)
  const float* deter;  // (N, D)
  const float* grad;   // (N, D) of the result, backward
  int64_t width;       // D
  float eps;
};
void gru_layernorm(const GruLayerNorm& a, float* out, int64_t begin, int64_t end);
// grad_affine (2, 3D), of scale and then of shift, is overwritten with the sum over rows
// [begin, end): one buffer for each range.
void gru_layernorm_backward(const GruLayerNorm& a, float* grad_parts, float* grad_deter,
                            float* grad_affine, int64_t begin, int64_t end);

}  // namespace fastwm
