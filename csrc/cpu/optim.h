// The optimizer: plain pointers and sizes, see kernels.h. A "chunk" is a piece of one tensor, so that
// any list of tensors is a list of equal pieces of work.
#pragma once

#include <stdint.h>

namespace fastwm {

// The sum of squares, in double and without overflow; infinite or NaN if an element is.
double sum_of_squares(const float* x, int64_t count);

struct LapropChunk {
  float *param, *mu, *nu;
  const float* grad;
  int64_t count;
  float grad_factor;   // 1 / (gradient scale * clipping)
  float weight_decay;  // of this tensor
};
struct LapropSettings {
  float lr, beta1, beta2, eps;
  float correct1, correct2;  // 1 / (1 - beta^t)
  bool nesterov;
};
void laprop_update(const LapropChunk& chunk, const LapropSettings& settings);

void ema_update(float* slow, const float* fast, float rate, int64_t count);

}  // namespace fastwm
