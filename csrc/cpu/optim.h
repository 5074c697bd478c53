// The optimizer: plain pointers and sizes, see kernels.h. A "chunk" is a piece of one tensor, so that
// any list of tensors is a list of equal pieces of work.
#pragma once

#include <stdint.h>

#include "bf16.h"

namespace fastwm {

// The sum of squares, in double and without overflow; infinite or NaN if an element is.
double sum_of_squares(const float* x, int64_t count);

struct OptimChunk {
  float *param, *mu, *nu;
  const float* grad;
  int64_t count;
};
void laprop_update(const OptimChunk& chunk, const OptimStep& step);
void adam_update(const OptimChunk& chunk, const OptimStep& step);

void ema_update(float* slow, const float* fast, float rate, int64_t count);

void to_bfloat16(const float* x, Bf16* out, int64_t count);

}  // namespace fastwm
