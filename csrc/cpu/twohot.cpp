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

void twohot_linear_pack(const TwohotMeanLinear& a) { FWM_CALL(twohot_linear_pack)(a); }

void twohot_mean_linear(const TwohotMeanLinear& a, float* mean, int64_t begin, int64_t end) {
  FWM_CALL(twohot_mean_linear)(a, mean, begin, end);
}

// Panels are at most 32 wide; their padding is counted for that width.
int64_t twohot_linear_packed_floats(int64_t count, int64_t inputs) {
  return (count + 31) / 32 * 32 * inputs + 16;
}

}  // namespace fastwm

#else

#include "cpu/rssm_body.h"
#include "cpu/softmax_rows.h"

namespace fastwm::FWM_ISA {

struct Pick {
  int64_t below, above;
  float to_below, to_above;
};

// The bins around a target; counting keeps the meaning of `bins <= target` to the last bit.
static inline Pick pick_bins(const float* bins, int64_t count, float target) {
  const int64_t passed = row_count(bins, target, count);
  // Not a number is neither below nor above any bin: from the first bin to the last, weights NaN.
  const int64_t over = target == target ? count - passed : 0;
  const int64_t below = passed > 0 ? passed - 1 : 0;
  const int64_t above = over > 0 ? count - over : count - 1;
  return {below, above, 0.0f, 0.0f};
}

static inline Pick two_hot(const float* bins, int64_t count, float target) {
  Pick pick = pick_bins(bins, count, target);
  const bool same = pick.below == pick.above;
  const float below = same ? 1.0f : fabsf(bins[pick.below] - target);
  const float above = same ? 1.0f : fabsf(bins[pick.above] - target);
  pick.to_below = above / (below + above);
  pick.to_above = below / (below + above);
  return pick;
}

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
  const float weights = a.weight[0] + (a.target[1] != nullptr ? a.weight[1] : 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    float* out = grad_logits + row * a.count;
    const float grad = a.grad_loss[row], factor = grad * weights / a.exp_sum[row];
    const float largest = row_max(x, a.count);
    row_exp(x, largest, factor, out, a.count);
    for (int k = 0; k < 2; ++k) {
      if (a.target[k] == nullptr) break;
      const Pick p = two_hot(a.bins, a.count, a.target[k][row]);
      out[p.below] -= grad * a.weight[k] * p.to_below;
      out[p.above] -= grad * a.weight[k] * p.to_above;
    }
  }
}

// sum over the positive bins of bin * (p_mirrored - p), before division by the softmax sum
static inline float mean_of(const float* exps, const float* bins, int64_t count) {
  const int64_t half = count / 2;
  const float* upper = exps + count - half;
  const float* positive = bins + count - half;
  float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < half; ++i) mean += positive[i] * (upper[i] - exps[half - 1 - i]);
  return mean;
}

// Rows of up to kLocal bins keep their exponentials on the stack.
constexpr int64_t kLocal = 1024;

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

// The head's own product: the logits of a few rows live in cache only.
void twohot_linear_pack(const TwohotMeanLinear& a) {
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, a.count, a.inputs);
  for (int64_t j = 0; j < panels.count(); ++j) {
    const float* source = a.weight + panels.column(j) * a.inputs;
    pack(panels.panel(j), 0, a.inputs, panels.width(j), source, a.inputs, 1);
  }
}

void twohot_mean_linear(const TwohotMeanLinear& a, float* mean, int64_t begin, int64_t end) {
  constexpr int64_t kRoom = 25 * (1024 + 16);  // floats of logits: 25 rows of 1024, 95 of 255
  float logits[kRoom], exps[kLocal];  // not in place: the last block of a row is read twice
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, a.count, a.inputs);
  const int64_t stride = padded(a.count);
  const int64_t room = kRoom / stride < kMostRows ? kRoom / stride : kMostRows;
  for (int64_t first = begin; first < end; first += room) {
    const int64_t rows = end - first < room ? end - first : room;
    const Part x{a.x + first * a.inputs, a.inputs, a.inputs};
    for (int64_t j = 0; j < panels.count(); ++j) {
      const int64_t column = panels.column(j);
      const Target to{a.bias + column, 0, logits + column, stride, panels.width(j)};
      product(panels.panel(j), x, kNone, to, 0, rows);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* x_row = logits + row * stride;
      const float sum = row_exp(x_row, row_max(x_row, a.count), 1.0f, exps, a.count);
      mean[first + row] = mean_of(exps, a.bins, a.count) / sum;
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
