// What follows a convolution of the encoder, 2x2 max pooling, bias, RMSNorm and SiLU, and the
// gradient of the convolution through all of it: plain pointers and sizes, see kernels.h. Images
// lie (H, W, C).
#pragma once

#include <stdint.h>

#include "scalars.h"

namespace fastwm {

struct PoolSizes {
  int64_t height, width, channels;  // H, W, C' of the convolution's result; odd edges are dropped
  float eps;
  int64_t rows() const { return height / 2; }
  int64_t columns() const { return width / 2; }
  int64_t pixels() const { return rows() * columns(); }  // of the pooled image
};

struct PoolSilu {
  const float* x;      // (N, H, W, C')
  const float* bias;   // (C')
  const float* scale;  // (C')
  PoolSizes n;
};
// pooled (N, H/2, W/2, C') is what the norm sees; index, 2 * row + column, says where it came from.
void pool_silu(const PoolSilu& a, float* y, float* pooled, uint8_t* index, int64_t begin,
               int64_t end);

// A whole stage: a 5 x 5 convolution of C inputs with SAME padding, and the above.
struct PoolStage {
  const float* x;        // (N, H, W, C), or null and
  const uint8_t* bytes;  // (N, H, W, C), each byte / 255 - 1/2
  const float* weight;   // packed by pool_stage_pack
  const float* bias;     // (C')
  const float* scale;    // (C')
  int64_t inputs;
  PoolSizes n;
  int64_t packed() const { return 6 * 5 * inputs * n.channels; }
};
struct PoolStagePlan {
  int64_t scratch;  // floats that one worker needs
  int64_t images;   // so many go together where they are narrower than a vector
};
struct PoolStageResults {  // (N, H/2, W/2, C')
  float* y;
  float* pooled;
  uint8_t* index;
};
PoolStagePlan pool_stage_plan(const PoolStage& a);
void pool_stage_pack(const PoolStage& a, const float* weight, float* packed);  // (C', C, 5, 5)
void pool_stage(const PoolStage& a, float* scratch, const PoolStageResults& to, int64_t begin,
                int64_t end);

// A pixel as a kernel reads it.
inline __attribute__((always_inline)) float pixel(float x) { return x; }
inline __attribute__((always_inline)) float pixel(uint8_t x) { return unit_byte(x) - 0.5f; }

struct PoolSiluGrad {
  const float* grad_y;   // (N, H/2, W/2, C')
  const float* pooled;   // (N, H/2, W/2, C')
  const uint8_t* index;  // (N, H/2, W/2, C')
  const float* scale;    // (C')
  PoolSizes n;
};
// sums (2, C') is overwritten with the gradients of bias and scale from images [begin, end).
// scratch: (W/2, C') floats.
void pool_silu_backward(const PoolSiluGrad& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end);

// The convolution before it, C inputs, odd kernel k, SAME padding. Of four of its results one has a
// gradient, so that a quarter of the library's multiplications remain.
struct PoolConv {
  PoolSiluGrad pool;
  const float* x;        // (N, H, W, C), or null and
  const uint8_t* bytes;  // (N, H, W, C), each byte / 255 - 1/2
  const float* weight;   // packed by pool_conv_pack; null: no gradient of x is wanted
  int64_t inputs, kernel;
  int64_t lanes() const { return (inputs + 3) / 4 * 4; }  // two pixels in whole vectors
  int64_t width() const { return ((kernel + 1) * lanes() + 7) / 8 * 8; }  // of a square's line
  int64_t taps() const { return (kernel * inputs + 7) / 8 * 8; }      // a row of the kernel in them
  int64_t sums() const { return pool.n.channels * kernel * taps(); }  // of the kernel's gradient
  int64_t packed() const { return pool.n.channels * 4 * (kernel + 1) * width(); }
  int64_t scratch() const;
};
// weight (C', C, k, k) as (k + 1, C', 4, width).
void pool_conv_pack(const PoolConv& a, const float* weight, float* packed);
// sums: (C', k, taps) of the kernel, then (2, C') as above; both overwritten. grad_x (N, H, W, C).
void pool_conv_backward(const PoolConv& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end);

}  // namespace fastwm
