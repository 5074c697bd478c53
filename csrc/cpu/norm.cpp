// RMSNorm and SiLU. One row at a time: a sweep for the sum of squares, a second one, in cache by
// then, for the rest. The backward pass computes the norm again instead of storing it.
#ifndef FWM_ISA
#include "cpu/norm.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/norm.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void rms_silu(const RmsSilu& a, float* y, int64_t begin, int64_t end) {
  FWM_CALL(rms_silu)(a, y, begin, end);
}

void rms_silu_backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                       int64_t end) {
  FWM_CALL(rms_silu_backward)(a, grad_x, grad_scale, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

static inline float inverse_rms(const float* x, int64_t features, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t u = 0; u < features; ++u) squares += x[u] * x[u];
  return 1.0f / sqrtf(squares / static_cast<float>(features) + eps);
}

void rms_silu(const RmsSilu& a, float* y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.features;
    float* out = y + row * a.features;
    const float inverse = inverse_rms(x, a.features, a.eps);
#pragma omp simd
    for (int64_t u = 0; u < a.features; ++u) out[u] = silu(x[u] * inverse * a.scale[u]);
  }
}

void rms_silu_backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                       int64_t end) {
  for (int64_t u = 0; u < a.features; ++u) grad_scale[u] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.features;
    const float* grad = a.grad_y + row * a.features;
    const float* scale = a.scale;
    float* out = grad_x + row * a.features;
    const float inverse = inverse_rms(x, a.features, a.eps);
    float dot = 0.0f;  // <gradient of the normed row, normed row>
#pragma omp simd reduction(+ : dot)
    for (int64_t u = 0; u < a.features; ++u) {
      const float normed = x[u] * inverse;
      const float grad_scaled = grad[u] * silu_grad(normed * scale[u]);
      const float grad_normed = grad_scaled * scale[u];
      grad_scale[u] += grad_scaled * normed;
      out[u] = grad_normed;
      dot += grad_normed * normed;
    }
    const float pull = inverse * dot / static_cast<float>(a.features);
#pragma omp simd
    for (int64_t u = 0; u < a.features; ++u) out[u] = inverse * (out[u] - pull * x[u]);
  }
}

}  // namespace fastwm::FWM_ISA

#endif
