// RMSNorm and SiLU of rows, for the kernels that end with them. Inlined into their loops: kWidth is
// the row's length where the caller knows it, so that short rows need no loops, or 0.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/lanes.h"
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

// Sum of a[u] b[u]. In short rows as vectors that are halved: the compiler would add number after
// number there.
template <int kWidth>
FWM_HD float row_dot(const float* a, const float* b, int64_t n) {
#if defined(__GNUC__)
  if constexpr (kWidth % 4 == 0 && kWidth > 0) {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    Four sum = {};
    if constexpr (kWidth >= 8) {
      Eight wide = *reinterpret_cast<const Eight*>(a) * *reinterpret_cast<const Eight*>(b);
#pragma GCC unroll 8
      for (int64_t u = 8; u + 8 <= kWidth; u += 8) {
        wide += *reinterpret_cast<const Eight*>(a + u) * *reinterpret_cast<const Eight*>(b + u);
      }
      sum = __builtin_shufflevector(wide, wide, 0, 1, 2, 3) +
            __builtin_shufflevector(wide, wide, 4, 5, 6, 7);
    }
    if constexpr (kWidth % 8 == 4) {
      constexpr int64_t u = kWidth - 4;
      sum += *reinterpret_cast<const Four*>(a + u) * *reinterpret_cast<const Four*>(b + u);
    }
    return sum[0] + sum[2] + (sum[1] + sum[3]);
  }
#endif
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t u = 0; u < n; ++u) sum += a[u] * b[u];
  return sum;
}

template <int kWidth>
FWM_HD void inverse_rms(const float* x, int64_t features, float eps, int64_t rows, float* inverse) {
  const int64_t n = kWidth ? kWidth : features;
  for (int64_t r = 0; r < rows; ++r) {
    inverse[r] = row_dot<kWidth>(x + r * n, x + r * n, n);
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
      FWM_SWEEP("omp simd", const float normed = from[u] * inverse[r];
                const float grad_scaled = grads[u] * silu_grad(normed * scale[u]);
                grad_scale[u] += grad_scaled * normed; to[u] = grad_scaled * scale[u];)
    }
    for (int64_t r = 0; r < count; ++r) {  // <gradient of the normed row, normed row>
      const float dot = row_dot<kWidth>(out + (first + r) * n, x + (first + r) * n, n);
      pull[r] = inverse[r] * inverse[r] * dot / static_cast<float>(n);
    }
    for (int64_t r = 0; r < count; ++r) {
      const float* from = x + (first + r) * n;
      float* to = out + (first + r) * n;
      FWM_SWEEP("omp simd", to[u] = inverse[r] * (to[u] - pull[r] * from[u]);)
    }
  }
}

}  // namespace fastwm
