// Per-element formulas, written once for host and device, so that the CPU tests cover what the GPU
// runs. float32 in, float32 out, no branches that keep a loop over them from being vectorised.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define FWM_HD __host__ __device__ __forceinline__
#else
#define FWM_HD inline __attribute__((always_inline))
#endif

namespace fastwm {

FWM_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FWM_HD float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx
FWM_HD float silu_grad(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// deter' of the block GRU from its three gates before their nonlinearities.
FWM_HD float gru_gate(float reset, float cand, float update, float deter) {
  const float u = sigmoid(update - 1.0f);
  return u * tanhf(sigmoid(reset) * cand) + (1.0f - u) * deter;
}

FWM_HD float symlog(float x) { return copysignf(log1pf(fabsf(x)), x); }

FWM_HD float symexp(float x) { return copysignf(expm1f(fabsf(x)), x); }

// One step of the lambda-return, and what its coefficients are.
FWM_HD float lambda_bootstrap(float trace, float value, float next) {
  return value + trace * (next - value);
}

FWM_HD float lambda_step(float reward, float discount, float trace, float value, float next) {
  return reward + discount * lambda_bootstrap(trace, value, next);
}

}  // namespace fastwm
