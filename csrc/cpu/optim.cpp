// The optimizer, chunk by chunk: bound by memory, 8 bytes per parameter for the norms and 28 for the
// update.
#ifndef FWM_ISA
#include "cpu/optim.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#define FWM_SOURCE "cpu/optim.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

double sum_of_squares(const float* x, int64_t count) { return FWM_CALL(sum_of_squares)(x, count); }

void laprop_update(const OptimChunk& chunk, const OptimStep& step) {
  FWM_CALL(laprop_update)(chunk, step);
}

void adam_update(const OptimChunk& chunk, const OptimStep& step) {
  FWM_CALL(adam_update)(chunk, step);
}

void to_bfloat16(const float* x, Bf16* out, int64_t count) {
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

void laprop_update(const OptimChunk& chunk, const OptimStep& step) {
  float *param = chunk.param, *mu = chunk.mu, *nu = chunk.nu;
  const float* grad = chunk.grad;
  const OptimStep s = step;  // by value: nothing that is written can change it
#pragma omp simd
  for (int64_t i = 0; i < chunk.count; ++i) laprop_element(s, grad[i], param[i], mu[i], nu[i]);
}

void adam_update(const OptimChunk& chunk, const OptimStep& step) {
  float *param = chunk.param, *mu = chunk.mu, *nu = chunk.nu;
  const float* grad = chunk.grad;
  const OptimStep s = step;
#pragma omp simd
  for (int64_t i = 0; i < chunk.count; ++i) adam_element(s, grad[i], param[i], mu[i], nu[i]);
}

void to_bfloat16(const float* x, Bf16* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(x[i], out[i]);
}

void ema_update(float* slow, const float* fast, float rate, int64_t count) {
  const float keep = 1.0f - rate;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) slow[i] = rate * fast[i] + keep * slow[i];
}

}  // namespace fastwm::FWM_ISA

#endif
