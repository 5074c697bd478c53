// The optimizer: plain pointers and sizes, see kernels.h. A "chunk" is a piece of one tensor, so that
// any list of tensors is a list of equal pieces of work.
#pragma once

#include <stdint.h>

namespace fastwm {

// The sum of squares, in double and without overflow; infinite or NaN if an element is.
double sum_of_squares(const float* x, int64_t count);

struct OptimChunk {
  float *param, *mu, *nu;
  const float* grad;
  int64_t count;
  float grad_factor;   // 1 / (gradient scale * clipping)
  float weight_decay;  // of this tensor
};
struct LapropSettings {
  float lr, beta1, beta2, eps;
  float mix1, mix2;          // 1 - beta
  float correct1, correct2;  // 1 / (1 - beta^t)
  bool nesterov;
};
void laprop_update(const OptimChunk& chunk, const LapropSettings& settings);

struct AdamSettings {
  float lr, beta1, beta2, eps;
  float mix1, mix2;          // 1 - beta
  float correct1, correct2;  // 1 / (1 - beta^t)
  float clip_value;          // of each element, after grad_factor
  bool decoupled;
};
void adam_update(const OptimChunk& chunk, const AdamSettings& settings);

void ema_update(float* slow, const float* fast, float rate, int64_t count);

// bfloat16, rounded to nearest even; NaN stays NaN.
void to_bfloat16(const float* x, uint16_t* out, int64_t count);

}  // namespace fastwm
