// Per-element formulas, written once for host and device, so that the CPU tests cover what the GPU
// runs. float32 in, float32 out, no branches that keep a loop over them from being vectorised.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FWM_HD __host__ __device__ __forceinline__
#else
#define FWM_HD inline __attribute__((always_inline))
#endif

namespace fastwm {

// 1 / (1 + exp(-x)) and tanh(x). A GPU has them. On a CPU calls into the library take longer than
// what follows, which is nearly as exact (see exp_floored); sigmoid ends at 2e-38.
#ifdef __CUDACC__
FWM_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FWM_HD float tanh_gate(float x) { return tanhf(x); }
#else
// exp(x) for x up to 88; exp(-87) = 2e-38 below, NaN for NaN. Inlined, it costs a third of a call
// into libmvec. x / ln 2 = n + f: adding 1.5 * 2^23 rounds to the integer n and leaves n in the low
// bits, the polynomial is 2^f on |f| <= 1/2, fitted to the least largest relative error. Relative
// error below 2e-7 + 2e-8 |x|, without fused multiply-add 2e-7 + 6e-8 |x|: what x / ln 2 loses.
FWM_HD float exp_floored(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float f = clamped * 1.44269504f - (shifted - 12582912.0f);
  float p = 1.32647261e-3f * f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

FWM_HD float sigmoid(float x) {
  const float e = exp_floored(-fabsf(x)), s = 1.0f / (1.0f + e);
  return x < 0.0f ? e * s : s;
}

// Near zero an odd polynomial, fitted to the least largest relative error: 1 - e would lose digits.
FWM_HD float tanh_gate(float x) {
  const float size = fabsf(x), e = exp_floored(-2.0f * size), z = x * x;
  const float large = copysignf((1.0f - e) / (1.0f + e), x);
  float p = -5.704959081e-3f * z + 2.063905974e-2f;
  p = p * z - 5.373970562e-2f;
  p = p * z + 1.333144207e-1f;
  p = p * z - 3.333328194e-1f;
  return size < 0.625f ? x + x * (z * p) : large;
}
#endif

FWM_HD float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx
FWM_HD float silu_grad(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// deter' of the block GRU from its three gates before their nonlinearities.
FWM_HD float gru_gate(float reset, float cand, float update, float deter) {
  const float u = sigmoid(update - 1.0f);
  return u * tanh_gate(sigmoid(reset) * cand) + (1.0f - u) * deter;
}

// Its backward: gradients of the three gates and of deter, from grad of deter'.
struct GruGateGrad {
  float reset, cand, update, deter;
};

FWM_HD GruGateGrad gru_gate_backward(float grad, float reset, float cand, float update,
                                     float deter) {
  const float r = sigmoid(reset), u = sigmoid(update - 1.0f), c = tanh_gate(r * cand);
  const float dc = grad * u * (1.0f - c * c);
  return {dc * cand * r * (1.0f - r), dc * r, grad * (c - deter) * u * (1.0f - u),
          grad * (1.0f - u)};
}

// A byte of an image as a number in [0, 1].
FWM_HD float unit_byte(unsigned char x) { return (float)x / 255.0f; }

// An action as the model sees it: divided by max(1, |a|).
FWM_HD float bounded(float action) {
  const float size = fabsf(action);
  return size > 1.0f ? action / size : action;
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

// Mixtures of normal distributions. A standard deviation below exp(-20) = 2e-9, closer than two
// float32 numbers of order one can lie, counts as exp(-20); the gradient ignores the bound.
constexpr float kMinLogStd = -20.0f;

FWM_HD float gmm_log_std(float log_std) { return log_std < kMinLogStd ? kMinLogStd : log_std; }

// log of (weight * density), less the constants that all components share.
FWM_HD float gmm_joint(float logit, float log_std, float z) {
  return logit - log_std - 0.5f * z * z;
}

// d nll / d mean and d log_std from the component's share r of the likelihood and z in deviations.
FWM_HD float gmm_grad_mean(float share, float z, float inverse_std) {
  return -(share * z) * inverse_std;
}

// Not share * (1 - z^2): a component too far away has share 0 and z^2 infinite.
FWM_HD float gmm_grad_log_std(float share, float z) { return share - (share * z) * z; }

// One element of an optimizer's step. `correct` are 1 / (1 - beta^t), `mix` 1 - beta.
struct OptimStep {
  float lr, beta1, beta2, eps, mix1, mix2, correct1, correct2;
  float grad_factor;   // 1 / (gradient scale * clipping)
  float weight_decay;  // of this tensor
  float clip_value;    // Adam: of each element, after grad_factor
  bool nesterov;       // LaProp
  bool decoupled;      // Adam: decay beside the update
};

FWM_HD void laprop_element(const OptimStep& s, float grad, float& param, float& mu, float& nu) {
  const float g = grad * s.grad_factor;
  const float second = s.beta2 * nu + s.mix2 * g * g;
  const float unit = g / (sqrtf(second * s.correct2) + s.eps);
  const float first = s.beta1 * mu + s.mix1 * unit;
  const float ahead = s.nesterov ? s.beta1 * first + s.mix1 * unit : first;
  param -= s.lr * (ahead * s.correct1 + s.weight_decay * param);
  mu = first;
  nu = second;
}

FWM_HD void adam_element(const OptimStep& s, float grad, float& param, float& mu, float& nu) {
  const float coupled = s.decoupled ? 0.0f : s.weight_decay, decoupled = s.weight_decay - coupled;
  const float scaled = grad * s.grad_factor,
              least = scaled < -s.clip_value ? -s.clip_value : scaled;
  const float g = (least > s.clip_value ? s.clip_value : least) + coupled * param;
  const float first = s.beta1 * mu + s.mix1 * g, second = s.beta2 * nu + s.mix2 * g * g;
  const float move = first * s.correct1 / (sqrtf(second * s.correct2) + s.eps);
  param -= s.lr * (move + decoupled * param);
  mu = first;
  nu = second;
}

}  // namespace fastwm
