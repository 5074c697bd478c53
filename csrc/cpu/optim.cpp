// The optimizer, chunk by chunk: bound by memory, 8 bytes per parameter for the norms and 28 for the
// update.
#ifndef FWM_ISA
#include <string.h>

#include "cpu/optim.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#define FWM_SOURCE "cpu/optim.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

double sum_of_squares(const float* x, int64_t count) { return FWM_CALL(sum_of_squares)(x, count); }

void laprop_update(const OptimChunk& chunk, const LapropSettings& settings) {
  FWM_CALL(laprop_update)(chunk, settings);
}

void adam_update(const OptimChunk& chunk, const AdamSettings& settings) {
  FWM_CALL(adam_update)(chunk, settings);
}

void to_bfloat16(const float* x, uint16_t* out, int64_t count) {
  FWM_CALL(to_bfloat16)(x, out, count);
}

void ema_update(float* slow, const float* fast, float rate, int64_t count) {
  FWM_CALL(ema_update)(slow, fast, rate, count);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

// Blocks of 1024 are summed in float32 lanes, the blocks in double. A block whose float32 sum
// overflows is summed again in double, so that only a non-finite element makes a non-finite sum.
double sum_of_squares(const float* x, int64_t count) {
  constexpr int64_t kSpan = 1024;
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kSpan) {
    const int64_t size = count - start < kSpan ? count - start : kSpan;
    const float* block = x + start;
    float lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) {
#pragma omp simd
      for (int64_t k = 0; k < 32; ++k) lanes[k] += block[i + k] * block[i + k];
    }
    for (; i < size; ++i) lanes[0] += block[i] * block[i];
    const float sum = sum16(lanes) + sum16(lanes + 16);
    if (sum <= 1e38f) {
      total += static_cast<double>(sum);
    } else {
      for (i = 0; i < size; ++i) total += static_cast<double>(block[i]) * block[i];
    }
  }
  return total;
}

void laprop_update(const OptimChunk& chunk, const LapropSettings& s) {
  float *param = chunk.param, *mu = chunk.mu, *nu = chunk.nu;
  const float *grad = chunk.grad, factor = chunk.grad_factor, decay = chunk.weight_decay;
  const float keep1 = s.beta1, mix1 = s.mix1, keep2 = s.beta2, mix2 = s.mix2;
  const float ahead = s.nesterov ? s.beta1 : 1.0f, direct = s.nesterov ? mix1 : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < chunk.count; ++i) {
    const float g = grad[i] * factor;
    const float second = keep2 * nu[i] + mix2 * g * g;
    const float unit = g / (sqrtf(second * s.correct2) + s.eps);
    const float first = keep1 * mu[i] + mix1 * unit;
    const float move = (ahead * first + direct * unit) * s.correct1 + decay * param[i];
    param[i] -= s.lr * move;
    mu[i] = first;
    nu[i] = second;
  }
}

void adam_update(const OptimChunk& chunk, const AdamSettings& s) {
  float *param = chunk.param, *mu = chunk.mu, *nu = chunk.nu;
  const float *grad = chunk.grad, factor = chunk.grad_factor, limit = s.clip_value;
  const float keep1 = s.beta1, mix1 = s.mix1, keep2 = s.beta2, mix2 = s.mix2;
  const float coupled = s.decoupled ? 0.0f : chunk.weight_decay;
  const float decoupled = s.decoupled ? chunk.weight_decay : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < chunk.count; ++i) {
    const float scaled = grad[i] * factor, least = scaled < -limit ? -limit : scaled;
    const float g = (least > limit ? limit : least) + coupled * param[i];
    const float first = keep1 * mu[i] + mix1 * g, second = keep2 * nu[i] + mix2 * g * g;
    const float move = first * s.correct1 / (sqrtf(second * s.correct2) + s.eps);
    param[i] -= s.lr * (move + decoupled * param[i]);
    mu[i] = first;
    nu[i] = second;
  }
}

void to_bfloat16(const float* x, uint16_t* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

void ema_update(float* slow, const float* fast, float rate, int64_t count) {
  const float keep = 1.0f - rate;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) slow[i] = rate * fast[i] + keep * slow[i];
}

}  // namespace fastwm::FWM_ISA

#endif
