// RMSNorm and SiLU: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

namespace fastwm {

struct RmsSilu {
  const float* x;       // (N, U)
  const float* scale;   // (U)
  const float* grad_y;  // (N, U), backward
  int64_t features;     // U
  float eps;
};
void rms_silu(const RmsSilu& a, float* y, int64_t begin, int64_t end);
// grad_scale (U) is overwritten with the sum over rows [begin, end): one buffer for each range.
void rms_silu_backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                       int64_t end);

}  // namespace fastwm
