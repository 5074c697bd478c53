// LayerNorm over the three parts of a dense GRU together, then its gates. One row at a time: two
// sweeps for mean and variance, a third one, in cache by then, for the rest. The backward pass
// computes norm and gates again instead of storing them.
#ifndef FWM_ISA
#include "cpu/rssm_layernorm.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/rssm_layernorm.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void gru_layernorm(const GruLayerNorm& a, float* out, int64_t begin, int64_t end) {
  FWM_CALL(gru_layernorm)(a, out, begin, end);
}

void gru_layernorm_backward(const GruLayerNorm& a, float* grad_parts, float* grad_deter,
                            float* grad_affine, int64_t begin, int64_t end) {
  FWM_CALL(gru_layernorm_backward)(a, grad_parts, grad_deter, grad_affine, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

struct Moments {
  float mean, inverse;  // inverse: 1 / standard deviation
};

static inline Moments moments(const float* x, int64_t count, float eps) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(count);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(squares / static_cast<float>(count) + eps)};
}

void gru_layernorm(const GruLayerNorm& a, float* out, int64_t begin, int64_t end) {
  const int64_t d = a.width;
  const float *scale = a.scale, *shift = a.shift;
  for (int64_t row = begin; row < end; ++row) {
    const float *x = a.parts + row * 3 * d, *deter = a.deter + row * d;
    float* y = out + row * d;
    const Moments m = moments(x, 3 * d, a.eps);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const int64_t c = d + i, u = 2 * d + i;
      const float reset = (x[i] - m.mean) * m.inverse * scale[i] + shift[i];
      const float cand = (x[c] - m.mean) * m.inverse * scale[c] + shift[c];
      const float update = (x[u] - m.mean) * m.inverse * scale[u] + shift[u];
      y[i] = gru_gate(reset, cand, update, deter[i]);
    }
  }
}

// Gradients of the three normed parts, for now in the places of the parts, and of deter.
static inline void gates_backward(const GruLayerNorm& a, const Moments& m, int64_t row, float* g,
                                  float* grad_deter) {
  const int64_t d = a.width;
  const float *scale = a.scale, *shift = a.shift;
  const float *x = a.parts + row * 3 * d, *deter = a.deter + row * d, *grad = a.grad + row * d;
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    const int64_t c = d + i, u = 2 * d + i;
    const float reset = (x[i] - m.mean) * m.inverse * scale[i] + shift[i];
    const float cand = (x[c] - m.mean) * m.inverse * scale[c] + shift[c];
    const float update = (x[u] - m.mean) * m.inverse * scale[u] + shift[u];
    const GruGateGrad of = gru_gate_backward(grad[i], reset, cand, update, deter[i]);
    g[i] = of.reset;
    g[c] = of.cand;
    g[u] = of.update;
    grad_deter[i] = of.deter;
  }
}

void gru_layernorm_backward(const GruLayerNorm& a, float* grad_parts, float* grad_deter,
                            float* grad_affine, int64_t begin, int64_t end) {
  const int64_t wide = 3 * a.width;
  float *grad_scale = grad_affine, *grad_shift = grad_affine + wide;
  for (int64_t i = 0; i < 2 * wide; ++i) grad_affine[i] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const float *x = a.parts + row * wide, *scale = a.scale;
    float* g = grad_parts + row * wide;
    const Moments m = moments(x, wide, a.eps);
    gates_backward(a, m, row, g, grad_deter + row * a.width);
    float sum = 0.0f, dot = 0.0f;  // of the gradient of the normed row, alone and times the row
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < wide; ++i) {
      const float normed = (x[i] - m.mean) * m.inverse;
      grad_shift[i] += g[i];
      grad_scale[i] += g[i] * normed;
      g[i] *= scale[i];
      sum += g[i];
      dot += g[i] * normed;
    }
    sum /= static_cast<float>(wide), dot /= static_cast<float>(wide);
#pragma omp simd
    for (int64_t i = 0; i < wide; ++i) {
      g[i] = m.inverse * (g[i] - sum - (x[i] - m.mean) * m.inverse * dot);
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
