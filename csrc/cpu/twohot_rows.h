// One row of V logits: its two-hot targets, the gradient of its loss, its mean. Included once per
// instruction set, inside a target region and behind softmax_rows.h: no include guard, no #include.

namespace fastwm::FWM_ISA {
namespace {

struct Pick {
  int64_t below, above;
  float to_below, to_above;
};

// The bins around a target; counting keeps the meaning of `bins <= target` to the last bit.
FWM_INLINE Pick pick_bins(const float* bins, int64_t count, float target) {
  const int64_t passed = row_count(bins, target, count);
  // Not a number is neither below nor above any bin: from the first bin to the last, weights NaN.
  const int64_t over = target == target ? count - passed : 0;
  const int64_t below = passed > 0 ? passed - 1 : 0;
  const int64_t above = over > 0 ? count - over : count - 1;
  return {below, above, 0.0f, 0.0f};
}

FWM_INLINE Pick two_hot(const float* bins, int64_t count, float target) {
  Pick pick = pick_bins(bins, count, target);
  const bool same = pick.below == pick.above;
  const float below = same ? 1.0f : fabsf(bins[pick.below] - target);
  const float above = same ? 1.0f : fabsf(bins[pick.above] - target);
  pick.to_below = above / (below + above);
  pick.to_above = below / (below + above);
  return pick;
}

// The gradient of a row's loss; `out` may not be the logits.
FWM_INLINE void loss_grad(const TwohotLoss& a, int64_t row, float* out) {
  const float* x = a.logits + row * a.count;
  const float weights = a.weight[0] + (a.target[1] != nullptr ? a.weight[1] : 0.0f);
  const float grad = a.grad_loss[row], factor = grad * weights / a.exp_sum[row];
  row_exp(x, row_max(x, a.count), factor, out, a.count);
  for (int k = 0; k < 2; ++k) {
    if (a.target[k] == nullptr) break;
    const Pick p = two_hot(a.bins, a.count, a.target[k][row]);
    out[p.below] -= grad * a.weight[k] * p.to_below;
    out[p.above] -= grad * a.weight[k] * p.to_above;
  }
}

// sum over the positive bins of bin * (p_mirrored - p), before division by the softmax sum
FWM_INLINE float mean_of(const float* exps, const float* bins, int64_t count) {
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

}  // namespace
}  // namespace fastwm::FWM_ISA
