// Negative log-likelihood of mixtures. The backward passes compute everything again from the inputs:
// three exponentials a component cost less than writing and reading another array.
//
// "factored" has the components innermost, five or so: sixteen latents at a time are turned round, so
// that each component is a vector over latents and sums over components need no shuffles.
#ifndef FWM_ISA
#include <string.h>

#include <utility>

#include "cpu/gmm.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#define FWM_SOURCE "cpu/gmm.cpp"

namespace fastwm {

constexpr float kHalfLogTwoPi = 0.918938533f;
constexpr float kLowest = -3.40282347e38f;  // a maximum that can be subtracted from -inf

}  // namespace fastwm

#include "cpu/each_isa.h"

namespace fastwm {

void gmm_joint_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end) {
  FWM_CALL(gmm_joint_nll)(a, nll, begin, end);
}

void gmm_joint_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end) {
  FWM_CALL(gmm_joint_backward)(a, out, begin, end);
}

void gmm_factored_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end) {
  FWM_CALL(gmm_factored_nll)(a, nll, begin, end);
}

void gmm_factored_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end) {
  FWM_CALL(gmm_factored_backward)(a, out, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

// ---- turning (lanes, M) into M vectors over lanes and back

#if defined(__GNUC__)
// With M odd, the numbers of one component that lie in M vectors of eight all lie in different lanes:
// M - 1 blends collect them and one permutation sorts them.
constexpr int place(int count, int component, int lane) {  // the latent that lies in this lane
  for (int i = 0; i < 8; ++i) {
    if ((i * count + component) % 8 == lane) return i;
  }
  return 0;
}

template <int M, int c, int v, int... lane>
FWM_HD void blend_in(Eight& all, const Eight& next, std::integer_sequence<int, lane...>) {
  all = __builtin_shufflevector(
      all, next, ((place(M, c, lane) * M + c) / 8 == v ? lane + 8 : lane)...);
}

template <int M, int c, int... lane, int... v>
FWM_HD void collect(const Eight* from, float* to, std::integer_sequence<int, lane...> lanes,
                    std::integer_sequence<int, v...>) {
  Eight all = from[0];
  (blend_in<M, c, v>(all, from[v], lanes), ...);
  *reinterpret_cast<Eight*>(to) = __builtin_shufflevector(all, all, ((lane * M + c) % 8)...);
}

template <int M, int... c>
FWM_HD void turn_eight(const float* x, float (*lanes)[kLanes], std::integer_sequence<int, c...> all) {
  const Eight from[M] = {reinterpret_cast<const Eight*>(x)[c]...};
  (collect<M, c>(from, lanes[c], std::make_integer_sequence<int, 8>(), all), ...);
}

template <int M, int v, int c, int... lane>
FWM_HD void blend_out(Eight& out, const Eight& next, std::integer_sequence<int, lane...>) {
  out = __builtin_shufflevector(out, next, ((v * 8 + lane) % M == c ? lane + 8 : lane)...);
}

template <int M, int v, int... c>
FWM_HD void spread(const Eight* spun, float* to, std::integer_sequence<int, c...>) {
  Eight out = spun[0];
  (blend_out<M, v, c>(out, spun[c], std::make_integer_sequence<int, 8>()), ...);
  reinterpret_cast<Eight*>(to)[v] = out;
}

template <int M, int c, int... lane>
FWM_HD void spin(const float* from, Eight& to, std::integer_sequence<int, lane...>) {
  const Eight x = *reinterpret_cast<const Eight*>(from);
  to = __builtin_shufflevector(x, x, place(M, c, lane)...);
}

template <int M, int... c>
FWM_HD void turn_eight_back(const float (*lanes)[kLanes], float* x,
                            std::integer_sequence<int, c...> all) {
  Eight spun[M];
  (spin<M, c>(lanes[c], spun[c], std::make_integer_sequence<int, 8>()), ...);
  (spread<M, c>(spun, x, all), ...);
}
#endif

// How many components, known when compiled or (0) at run time only.
template <int M>
struct Components {
  static constexpr int kRoom = M > 0 ? M : static_cast<int>(kMaxComponents);
  int run_time;
  int count() const { return M > 0 ? M : run_time; }
};

template <int M>
FWM_HD void turn(const float* x, const Components<M>& k, float (*lanes)[kLanes]) {
#if defined(__GNUC__)
  if constexpr (M % 2 == 1) {
    constexpr auto all = std::make_integer_sequence<int, M>();
    turn_eight<M>(x, lanes, all);
    turn_eight<M>(x + 8 * M, reinterpret_cast<float(*)[kLanes]>(&lanes[0][8]), all);
    return;
  }
#endif
  turn_rows(x, k.count(), lanes);
}

template <int M>
FWM_HD void turn_back(const float (*lanes)[kLanes], const Components<M>& k, float* x) {
#if defined(__GNUC__)
  if constexpr (M % 2 == 1) {
    constexpr auto all = std::make_integer_sequence<int, M>();
    turn_eight_back<M>(lanes, x, all);
    turn_eight_back<M>(reinterpret_cast<const float(*)[kLanes]>(&lanes[0][8]), x + 8 * M, all);
    return;
  }
#endif
  turn_rows_back(lanes, k.count(), x);
}

// ---- factored

// Sixteen mixtures: the softmax of the logits, and of the joint: exponentials and their sums.
template <int M>
struct Block {
  float target[kLanes];
  float mean[Components<M>::kRoom][kLanes];     // later: deviations z
  float log_std[Components<M>::kRoom][kLanes];  // later: 1 / std
  float logits[Components<M>::kRoom][kLanes];   // later: exp(logit - largest)
  float joint[Components<M>::kRoom][kLanes];    // later: exp(joint - largest)
  float logit_max[kLanes], logit_sum[kLanes], joint_max[kLanes], joint_sum[kLanes];
};

template <int M>
FWM_HD void evaluate(Block<M>& b, const Components<M>& k) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) b.logit_max[i] = b.joint_max[i] = kLowest;
  for (int m = 0; m < k.count(); ++m) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float log_std = gmm_log_std(b.log_std[m][i]), inverse = exp_floored(-log_std);
      const float z = (b.target[i] - b.mean[m][i]) * inverse, logit = b.logits[m][i];
      const float joint = gmm_joint(logit, log_std, z);
      b.mean[m][i] = z;
      b.log_std[m][i] = inverse;
      b.joint[m][i] = joint;
      b.logit_max[i] = logit > b.logit_max[i] ? logit : b.logit_max[i];
      b.joint_max[i] = joint > b.joint_max[i] ? joint : b.joint_max[i];
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) b.logit_sum[i] = b.joint_sum[i] = 0.0f;
  for (int m = 0; m < k.count(); ++m) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float logit = exp_floored(b.logits[m][i] - b.logit_max[i]);
      const float joint = exp_nonpos(b.joint[m][i] - b.joint_max[i]);
      b.logits[m][i] = logit;
      b.joint[m][i] = joint;
      b.logit_sum[i] += logit;
      b.joint_sum[i] += joint;
    }
  }
}

template <int M>
FWM_HD void factored_block(const float* target, const float* mean, const float* log_std,
                           const float* logits, const Components<M>& k, Block<M>& b) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) b.target[i] = target[i];
  turn<M>(mean, k, b.mean);
  turn<M>(log_std, k, b.log_std);
  turn<M>(logits, k, b.logits);
  evaluate<M>(b, k);
}

template <int M>
FWM_HD void block_nll(const Block<M>& b, float* nll) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const float log_ratio = log_positive(b.logit_sum[i]) - log_positive(b.joint_sum[i]);
    nll[i] = (b.logit_max[i] - b.joint_max[i]) + log_ratio + kHalfLogTwoPi;
  }
}

template <int M>
FWM_HD void block_grads(Block<M>& b, const Components<M>& k, const float* grad) {
  float logit_scale[kLanes], joint_scale[kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    logit_scale[i] = grad[i] / b.logit_sum[i];
    joint_scale[i] = b.joint_sum[i] == 0.0f ? 0.0f : grad[i] / b.joint_sum[i];
  }
  for (int m = 0; m < k.count(); ++m) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float share = b.joint[m][i] * joint_scale[i], z = b.mean[m][i];
      b.logits[m][i] = b.logits[m][i] * logit_scale[i] - share;
      b.mean[m][i] = gmm_grad_mean(share, z, b.log_std[m][i]);
      b.log_std[m][i] = gmm_grad_log_std(share, z);
    }
  }
}

// `count` mixtures that lie one after the other; f(block, first, size) takes what was computed.
template <int M, class F>
FWM_HD void each_block(const float* target, const float* mean, const float* log_std,
                       const float* logits, const Components<M>& k, int64_t count, const F& f) {
  Block<M> b;
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    const int64_t at = first * k.count();
    factored_block<M>(target + first, mean + at, log_std + at, logits + at, k, b);
    f(b, first, int64_t{kLanes});
  }
  if (first == count) return;
  const int64_t rest = count - first, at = first * k.count();
  float values[3][Components<M>::kRoom * kLanes] = {}, goal[kLanes] = {};
  memcpy(goal, target + first, rest * sizeof(float));
  memcpy(values[0], mean + at, rest * k.count() * sizeof(float));
  memcpy(values[1], log_std + at, rest * k.count() * sizeof(float));
  memcpy(values[2], logits + at, rest * k.count() * sizeof(float));
  factored_block<M>(goal, values[0], values[1], values[2], k, b);
  f(b, first, rest);
}

// Rows one by one, or all at once where nothing lies between them.
template <int M, class F>
FWM_HD void each_span(const GmmNll& a, const Components<M>& k, int64_t begin, int64_t end,
                      const F& f) {
  const int64_t row = a.latents * a.components;
  const bool dense = a.mean.stride == row && a.log_std.stride == row && a.logits.stride == row;
  const int64_t step = dense ? end - begin : 1;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t offset = n * a.latents;
    each_block<M>(a.target + offset, a.mean.data + n * a.mean.stride,
                  a.log_std.data + n * a.log_std.stride, a.logits.data + n * a.logits.stride, k,
                  step * a.latents,
                  [&](Block<M>& b, int64_t first, int64_t size) { f(b, offset + first, size); });
  }
}

template <int M>
static void factored_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end) {
  const Components<M> k{static_cast<int>(a.components)};
  each_span<M>(a, k, begin, end, [&](Block<M>& b, int64_t first, int64_t size) {
    float values[kLanes];
    block_nll<M>(b, values);
    memcpy(nll + first, values, size * sizeof(float));
  });
}

template <int M>
FWM_HD void store(const float (*lanes)[kLanes], const Components<M>& k, float* to, int64_t size) {
  if (size == kLanes) {
    turn_back<M>(lanes, k, to);
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    for (int m = 0; m < k.count(); ++m) to[i * k.count() + m] = lanes[m][i];
  }
}

template <int M>
static void factored_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end) {
  const Components<M> k{static_cast<int>(a.components)};
  each_span<M>(a, k, begin, end, [&](Block<M>& b, int64_t first, int64_t size) {
    float grad[kLanes] = {};
    memcpy(grad, a.grad_nll + first, size * sizeof(float));
    block_grads<M>(b, k, grad);
    const int64_t at = first * k.count();
    store<M>(b.mean, k, out.mean + at, size);
    store<M>(b.log_std, k, out.log_std + at, size);
    store<M>(b.logits, k, out.logits + at, size);
  });
}

void gmm_factored_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end) {
  switch (a.components) {
    case 3: return factored_nll<3>(a, nll, begin, end);
    case 5: return factored_nll<5>(a, nll, begin, end);
    default: return factored_nll<0>(a, nll, begin, end);
  }
}

void gmm_factored_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end) {
  switch (a.components) {
    case 3: return factored_backward<3>(a, out, begin, end);
    case 5: return factored_backward<5>(a, out, begin, end);
    default: return factored_backward<0>(a, out, begin, end);
  }
}

// ---- joint

// A row's mixture as whole vectors: beyond M lie components of no weight.
struct JointRow {
  float logits[kMaxComponents];  // later: exp(logit - largest)
  float joint[kMaxComponents];   // later: exp(joint - largest)
  float logit_max, logit_sum, joint_max, joint_sum;
};

// What z and 1 / std are kept in where the backward pass wants them.
struct Kept {
  float *z, *inverse;
};

template <bool keep>
FWM_HD float distance_at(const float* target, const float* mean, const float* log_std, int64_t i,
                         const Kept& to) {
  const float bounded = gmm_log_std(log_std[i]), inverse = exp_floored(-bounded);
  const float z = (target[i] - mean[i]) * inverse;
  if (keep) to.z[i] = z, to.inverse[i] = inverse;
  return -gmm_joint(0.0f, bounded, z);
}

// sum over the latents of log std + z^2 / 2.
template <bool keep>
FWM_HD float joint_distance(const float* target, const float* mean, const float* log_std,
                            int64_t latents, const Kept& to) {
  float lanes[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= latents; first += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      lanes[i] += distance_at<keep>(target, mean, log_std, first + i, to);
    }
  }
#pragma omp simd
  for (int64_t i = first; i < latents; ++i) {
    lanes[i - first] += distance_at<keep>(target, mean, log_std, i, to);
  }
  return sum16(lanes);
}

// x = exp(x - largest) over whole vectors; returns largest, and the sum of x.
FWM_HD float shares(float* x, int64_t padded, float* sum) {
  float largest[kLanes], lanes[kLanes] = {}, most = kLowest;
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) largest[i] = kLowest;
  for (int64_t m = 0; m < padded; m += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) largest[i] = x[m + i] > largest[i] ? x[m + i] : largest[i];
  }
#pragma omp simd reduction(max : most)
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  for (int64_t m = 0; m < padded; m += kLanes) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) lanes[i] += x[m + i] = exp_nonpos(x[m + i] - most);
  }
  *sum = sum16(lanes);
  return most;
}

template <bool keep>
FWM_HD void joint_row(const GmmNll& a, int64_t n, const GmmGrads& to, JointRow& row) {
  const float *mean = a.mean.data + n * a.mean.stride, *target = a.target + n * a.latents;
  const float* log_std = a.log_std.data + n * a.log_std.stride;
  const float* logits = a.logits.data + n * a.logits.stride;
  const int64_t padded = (a.components + kLanes - 1) / kLanes * kLanes;
  for (int64_t m = 0; m < a.components; ++m) {
    const int64_t at = m * a.latents, out = (n * a.components + m) * a.latents;
    const Kept kept{keep ? to.mean + out : nullptr, keep ? to.log_std + out : nullptr};
    row.logits[m] = logits[m];
    row.joint[m] =
        logits[m] - joint_distance<keep>(target, mean + at, log_std + at, a.latents, kept);
  }
  for (int64_t m = a.components; m < padded; ++m) row.logits[m] = row.joint[m] = -INFINITY;
  row.logit_max = shares(row.logits, padded, &row.logit_sum);
  row.joint_max = shares(row.joint, padded, &row.joint_sum);
}

void gmm_joint_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end) {
  const float constant = kHalfLogTwoPi * static_cast<float>(a.latents);
  JointRow row;
  for (int64_t n = begin; n < end; ++n) {
    joint_row<false>(a, n, {}, row);
    nll[n] = (row.logit_max - row.joint_max) +
             (log_positive(row.logit_sum) - log_positive(row.joint_sum)) + constant;
  }
}

void gmm_joint_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end) {
  JointRow row;
  for (int64_t n = begin; n < end; ++n) {
    joint_row<true>(a, n, out, row);
    const float grad = a.grad_nll[n], weight = grad / row.logit_sum;
    const float scale = row.joint_sum == 0.0f ? 0.0f : grad / row.joint_sum;
    for (int64_t m = 0; m < a.components; ++m) {
      const int64_t at = n * a.components + m;
      const float share = row.joint[m] * scale;
      float *to_mean = out.mean + at * a.latents, *to_log_std = out.log_std + at * a.latents;
      out.logits[at] = row.logits[m] * weight - share;
#pragma omp simd
      for (int64_t i = 0; i < a.latents; ++i) {
        const float z = to_mean[i];
        to_mean[i] = gmm_grad_mean(share, z, to_log_std[i]);
        to_log_std[i] = gmm_grad_log_std(share, z);
      }
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
