// Lambda-return. One thread owns whole rows; a row is a serial recursion over time, so kLanes rows
// advance together, one per SIMD lane. Memory traffic is 5 floats per step: bandwidth-bound for
// batches beyond the cache, latency-bound below.
#ifndef FWM_ISA
#include "cpu/kernels.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/lambda_return.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void lambda_return(const LambdaReturn& a, float* returns, int64_t begin, int64_t end) {
  FWM_CALL(lambda_return)(a, returns, begin, end);
}

void lambda_return_backward(const LambdaReturn& a, float* grad_reward, float* grad_value,
                            float* grad_discount, int64_t begin, int64_t end) {
  FWM_CALL(lambda_return_backward)
  (a, grad_reward, grad_value, grad_discount, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

constexpr int64_t kLanes = 16;

void lambda_return(const LambdaReturn& a, float* returns, int64_t begin, int64_t end) {
  const int64_t length = a.length;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t lanes = end - first < kLanes ? end - first : kLanes;
    float next[kLanes];
    for (int64_t i = 0; i < lanes; ++i) next[i] = a.value[(first + i + 1) * length - 1];
    for (int64_t t = length - 1; t > 0; --t) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t j = (first + i) * length + t;
        next[i] = lambda_step(a.reward[j], a.discount[j], a.trace[j], a.value[j], next[i]);
        returns[(first + i) * (length - 1) + t - 1] = next[i];
      }
    }
  }
}

// Forward in time: `carry` is the gradient of returns[t-1], whose step reads row t and returns[t].
void lambda_return_backward(const LambdaReturn& a, float* grad_reward, float* grad_value,
                            float* grad_discount, int64_t begin, int64_t end) {
  const int64_t length = a.length;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t lanes = end - first < kLanes ? end - first : kLanes;
    float carry[kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t j = (first + i) * length;
      grad_reward[j] = grad_value[j] = grad_discount[j] = 0.0f;
    }
    for (int64_t t = 1; t < length; ++t) {
      const bool is_final = t == length - 1;
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t j = (first + i) * length + t;
        const int64_t k = (first + i) * (length - 1) + t - 1;
        const float grad = a.grad_returns[k] + carry[i];
        const float next = is_final ? a.value[j] : a.returns[k + 1];
        const float trace = is_final ? 0.0f : a.trace[j];
        grad_reward[j] = grad;
        grad_discount[j] = grad * lambda_bootstrap(trace, a.value[j], next);
        grad_value[j] = grad * a.discount[j] * (1.0f - trace);
        carry[i] = grad * a.discount[j] * trace;
      }
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
