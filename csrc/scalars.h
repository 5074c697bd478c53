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

#ifndef __CUDACC__
FWM_HD float choose(bool condition, float a, float b) { return condition ? a : b; }
FWM_HD float magnitude(float x) { return fabsf(x); }
FWM_HD float signed_as(float x, float like) { return copysignf(x, like); }
// 2^n from 1.5 * 2^23 + n
FWM_HD float power_of_two(float shifted) {
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  memcpy(&power, &bits, 4);
  return power;
}
#endif

#define FWM_NUMBER float
#define FWM_GRAD GruGateGrad
#include "formulas.h"
#undef FWM_NUMBER
#undef FWM_GRAD

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
