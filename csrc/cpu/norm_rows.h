// RMSNorm and SiLU of rows, for the kernels that end with them. Inlined into their loops: kWidth is
// the row's length where the caller knows it, so that short rows need no loops, or 0.
#pragma once

#include <math.h>
#include <stdint.h>

#include "scalars.h"

namespace fastwm {

// Calls FORM(width) with the row's length as a constant where that is a common number of channels.
#define FWM_FOR_WIDTH(features, FORM) \
  switch (features) {                 \
    case 8:                           \
      FORM(8);                        \
      break;                          \
    case 12:                          \
      FORM(12);                       \
      break;                          \
    case 16:                          \
      FORM(16);                       \
      break;                          \
    case 32:                          \
      FORM(32);                       \
      break;                          \
    default:                          \
      FORM(0);                        \
  }

// A loop over u in [0, n), vectors first: of 12 numbers eight and then four.
#define FWM_SWEEP(PRAGMA, ...)                                                       \
  _Pragma(PRAGMA) for (int64_t u = 0; u < kWidth / 8 * 8; ++u){__VA_ARGS__} _Pragma( \
      PRAGMA) for (int64_t u = kWidth / 8 * 8; u < n; ++u) {                         \
    __VA_ARGS__                                                                      \
  }

// So many rows go through each phase together: a row waits for its sums, roots and quotients, and
// short rows would do nothing else.
constexpr int kNormRows = 16;

template <int kWidth>
FWM_HD void inverse_rms(const float* x, int64_t features, float eps, int64_t rows, float* inverse) {
  const int64_t n = kWidth ? kWidth : features;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * n;
    float squares = 0.0f;
    FWM_SWEEP("omp simd reduction(+ : squares)", squares += row[u] * row[u];)
    inverse[r] = squares;
  }
#pragma omp simd
  for (int64_t r = 0; r < kNormRows; ++r) {
    inverse[r] = 1.0f / sqrtf(inverse[r] / static_cast<float>(n) + eps);
  }
}

// Rows lie one after the other in x and out.
template <int kWidth>
FWM_HD void rms_silu_rows(const float* __restrict__ x, const float* __restrict__ scale,
                          int64_t features, float eps, int64_t rows, float* __restrict__ out) {
  const int64_t n = kWidth ? kWidth : features;
  float inverse[kNormRows] = {};
  for (int64_t first = 0; first < rows; first += kNormRows) {
    const int64_t count = rows - first < kNormRows ? rows - first : kNormRows;
    inverse_rms<kWidth>(x + first * n, n, eps, count, inverse);
    for (int64_t r = 0; r < count; ++r) {
      const float* from = x + (first + r) * n;
      float* to = out + (first + r) * n;
      FWM_SWEEP("omp simd", to[u] = silu(from[u] * inverse[r] * scale[u]);)
    }
  }
}

// Adds the rows' part to grad_scale.
template <int kWidth>
FWM_HD void rms_silu_rows_backward(const float* __restrict__ x, const float* __restrict__ scale,
                                   const float* __restrict__ grad, int64_t features, float eps,
                                   int64_t rows, float* __restrict__ out,
                                   float* __restrict__ grad_scale) {
  const int64_t n = kWidth ? kWidth : features;
  float inverse[kNormRows] = {}, pull[kNormRows] = {};
  for (int64_t first = 0; first < rows; first += kNormRows) {
    const int64_t count = rows - first < kNormRows ? rows - first : kNormRows;
    inverse_rms<kWidth>(x + first * n, n, eps, count, inverse);
    for (int64_t r = 0; r < count; ++r) {
      const float *from = x + (first + r) * n, *grads = grad + (first + r) * n;
      float* to = out + (first + r) * n;
      float dot = 0.0f;  // <gradient of the normed row, normed row>
      FWM_SWEEP("omp simd reduction(+ : dot)", const float normed = from[u] * inverse[r];
                const float grad_scaled = grads[u] * silu_grad(normed * scale[u]);
                const float grad_normed = grad_scaled * scale[u];
                grad_scale[u] += grad_scaled * normed; to[u] = grad_normed;
                dot += grad_normed * normed;)
      pull[r] = inverse[r] * dot / static_cast<float>(n);
    }
    for (int64_t r = 0; r < count; ++r) {
      const float* from = x + (first + r) * n;
      float* to = out + (first + r) * n;
      FWM_SWEEP("omp simd", to[u] = inverse[r] * (to[u] - pull[r] * from[u]);)
    }
  }
}

}  // namespace fastwm
