// Two-hot loss and mean, one row of V logits at a time, which stays in the first-level cache.
// The backward passes compute the softmax again: an exponential costs 0.2 ns, the stored gradient
// that would spare it one more write and read of the whole array.
#ifndef FWM_ISA
#include "cpu/simd.h"
#include "cpu/twohot.h"
#define FWM_SOURCE "cpu/twohot.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void twohot_loss(const TwohotLoss& a, float* loss, int64_t begin, int64_t end) {
  FWM_CALL(twohot_loss)(a, loss, begin, end);
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

namespace fastwm::FWM_ISA {

// Rows are walked in whole blocks, because a scalar tail would cost as much as all the rest: the
// last block ends with the row and overlaps its neighbour. Shorter rows take the plain loops.
constexpr int64_t kBlock = 32;

static inline float row_max(const float* x, int64_t count) {
  float largest = -INFINITY;
  if (count < kBlock) {
    for (int64_t v = 0; v < count; ++v) largest = x[v] > largest ? x[v] : largest;
    return largest;
  }
  float lanes[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) lanes[i] = x[count - kBlock + i];
  for (int64_t v = 0; v + kBlock < count; v += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) lanes[i] = x[v + i] > lanes[i] ? x[v + i] : lanes[i];
  }
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < kBlock; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// Writes exp(x - shift) to `out` if it is not null; returns the sum.
static inline float row_exp(const float* x, float shift, float* out, int64_t count) {
  float sum = 0.0f;
  if (count < kBlock) {
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < count; ++v) {
      const float e = expf(x[v] - shift);
      if (out != nullptr) out[v] = e;
      sum += e;
    }
    return sum;
  }
  float lanes[kBlock] = {};
  int64_t v = 0;
  for (; v + kBlock <= count; v += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const float e = expf(x[v + i] - shift);
      lanes[i] += e;
      if (out != nullptr) out[v + i] = e;
    }
  }
  const int64_t first = count - kBlock, done = v - first;  // done == kBlock: nothing is left
  if (done < kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const float e = expf(x[first + i] - shift);
      lanes[i] += i < done ? 0.0f : e;
      if (out != nullptr) out[first + i] = e;
    }
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < kBlock; ++i) sum += lanes[i];
  return sum;
}

struct Pick {
  int64_t below, above;
  float to_below, to_above;
};

// The bins around a target; counting keeps the meaning of `bins <= target` to the last bit.
static inline Pick pick_bins(const float* bins, int64_t count, float target) {
  int32_t passed = 0;
#pragma omp simd reduction(+ : passed)
  for (int64_t v = 0; v < count; ++v) passed += bins[v] <= target ? 1 : 0;
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

void twohot_loss(const TwohotLoss& a, float* loss, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    const float largest = row_max(x, a.count);
    const float log_sum = logf(row_exp(x, largest, nullptr, a.count)) + largest;
    float total = 0.0f;
    for (int k = 0; k < 2; ++k) {
      if (a.target[k] == nullptr) break;
      const Pick p = two_hot(a.bins, a.count, a.target[k][row]);
      total += a.weight[k] *
               (p.to_below * (log_sum - x[p.below]) + p.to_above * (log_sum - x[p.above]));
    }
    loss[row] = total;
  }
}

void twohot_loss_backward(const TwohotLoss& a, float* grad_logits, int64_t begin, int64_t end) {
  const float weights = a.weight[0] + (a.target[1] != nullptr ? a.weight[1] : 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    float* out = grad_logits + row * a.count;
    const float sum = row_exp(x, row_max(x, a.count), out, a.count);
    const float grad = a.grad_loss[row];
    const float factor = grad * weights / sum;
#pragma omp simd
    for (int64_t v = 0; v < a.count; ++v) out[v] *= factor;
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
    const float sum = row_exp(x, row_max(x, a.count), exps, a.count);
    mean[row] = mean_of(exps, a.bins, a.count) / sum;
  }
}

void twohot_mean_backward(const TwohotMean& a, float* grad_logits, int64_t begin, int64_t end) {
  const int64_t half = a.count / 2;
  const float* positive = a.bins + a.count - half;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.logits + row * a.count;
    float* out = grad_logits + row * a.count;
    const float sum = row_exp(x, row_max(x, a.count), out, a.count);
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
