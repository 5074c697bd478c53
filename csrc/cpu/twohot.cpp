// Two-hot loss and mean, one row of V logits at a time, which stays in the first-level cache.
// The backward passes compute the softmax again: an exponential costs less than what storing the
// gradient in the forward pass would, one more sweep of the whole array.
#ifndef FWM_ISA
#include "cpu/twohot.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#include "cpu/team.h"
#define FWM_SOURCE "cpu/twohot.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void twohot_loss(const TwohotLoss& a, float* loss, float* exp_sum, int64_t begin, int64_t end) {
  FWM_CALL(twohot_loss)(a, loss, exp_sum, begin, end);
}

void twohot_loss_backward(const TwohotLoss& a, float* grad_logits, int64_t begin, int64_t end) {
  FWM_CALL(twohot_loss_backward)(a, grad_logits, begin, end);
}

void twohot_mean(const TwohotMean& a, float* mean, int64_t begin, int64_t end) {
  FWM_CALL(twohot_mean)(a, mean, begin, end);
}

void twohot_mean_backward(const TwohotMean& a, float* grad_logits, int64_t begin, int64_t end) {
  FWM_CALL(twohot_mean_backward)(a, grad_logits, begin, end);
}

}  // namespace fastwm

#else

#include "cpu/vec.h"

#include "cpu/softmax_rows.h"
#include "cpu/twohot_rows.h"

namespace fastwm::FWM_ISA {

void twohot_loss(const TwohotLoss& a, float* loss, float* exp_sum, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    const float largest = row_max(x, a.count);
    const float sum = row_exp(x, largest, 1.0f, nullptr, a.count), log_sum = logf(sum);
    float total = 0.0f;
    for (int k = 0; k < 2; ++k) {
      if (a.target[k] == nullptr) break;
      const Pick p = two_hot(a.bins, a.count, a.target[k][row]);
      total += a.weight[k] * (p.to_below * ((largest - x[p.below]) + log_sum) +
                              p.to_above * ((largest - x[p.above]) + log_sum));
    }
    loss[row] = total;
    exp_sum[row] = sum;
  }
}

void twohot_loss_backward(const TwohotLoss& a, float* grad_logits, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) loss_grad(a, row, grad_logits + row * a.count);
}

void twohot_mean(const TwohotMean& a, float* mean, int64_t begin, int64_t end) {
  float exps[kLocal];
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    const float sum = row_exp(x, row_max(x, a.count), 1.0f, exps, a.count);
    mean[row] = mean_of(exps, a.bins, a.count) / sum;
  }
}

void twohot_mean_backward(const TwohotMean& a, float* grad_logits, int64_t begin, int64_t end) {
  const int64_t half = a.count / 2;
  const float* positive = a.bins + a.count - half;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    float* out = grad_logits + row * a.count;
    const float sum = row_exp(x, row_max(x, a.count), 1.0f, out, a.count);
    const float mean = mean_of(out, a.bins, a.count) / sum;
    const float factor = a.grad_mean[row] / sum;
    float* upper = out + a.count - half;
    if (a.count % 2 == 1) out[half] *= -factor * mean;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) upper[i] *= factor * (positive[i] - mean);
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) out[i] *= factor * (-positive[half - 1 - i] - mean);
  }
}

}  // namespace fastwm::FWM_ISA

#endif
