// Categorical latents, one group of K classes at a time in vectors of 16. A group that is no
// multiple of 16 is copied to the stack and padded with -inf, whose probability is exactly 0.
#ifndef FWM_ISA
#include "cpu/latent.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#define FWM_SOURCE "cpu/latent.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void latent_sample(const LatentSample& a, uint8_t* index, float* log_probs, int64_t begin,
                   int64_t end) {
  FWM_CALL(latent_sample<uint8_t>)(a, index, log_probs, begin, end);
}

void latent_sample(const LatentSample& a, int64_t* index, float* log_probs, int64_t begin,
                   int64_t end) {
  FWM_CALL(latent_sample<int64_t>)(a, index, log_probs, begin, end);
}

void one_hot(const uint8_t* index, float* out, int64_t classes, int64_t begin, int64_t end) {
  FWM_CALL(one_hot<uint8_t>)(index, out, classes, begin, end);
}

void one_hot(const int64_t* index, float* out, int64_t classes, int64_t begin, int64_t end) {
  FWM_CALL(one_hot<int64_t>)(index, out, classes, begin, end);
}

void latent_backward(const LatentBackward& a, float* grad_logits, int64_t begin, int64_t end) {
  FWM_CALL(latent_backward)(a, grad_logits, begin, end);
}

void kl_balance(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  FWM_CALL(kl_balance)(a, out, begin, end);
}

void scale_rows(const float* factor, const float* x, float* out, int64_t columns, int64_t begin,
                int64_t end) {
  FWM_CALL(scale_rows)(factor, x, out, columns, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

constexpr int64_t kLanes = 16;

// How K classes lie in whole vectors, and how the softmax is mixed with the uniform distribution.
struct Layout {
  int64_t classes, padded;
  float keep, share;  // p = keep * softmax + share
  bool mixed;
};

static inline Layout layout_of(int64_t classes, float unimix) {
  const int64_t padded = (classes + kLanes - 1) / kLanes * kLanes;
  return {classes, padded, 1.0f - unimix, unimix / static_cast<float>(classes), unimix != 0.0f};
}

// The group itself if it fills its vectors, else a padded copy.
static inline const float* padded_group(const float* x, const Layout& k, float* copy, float fill) {
  if (k.classes == k.padded) return x;
  for (int64_t c = 0; c < k.classes; ++c) copy[c] = x[c];
  for (int64_t c = k.classes; c < k.padded; ++c) copy[c] = fill;
  return copy;
}

static inline float sum_lanes(const float* lanes) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

static inline float max_of(const float* x, const Layout& k) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[i];
  for (int64_t c = kLanes; c < k.padded; c += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = x[c + i] > lanes[i] ? x[c + i] : lanes[i];
  }
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

struct Shift {
  float largest, sum;
};

// soft = softmax(x) over a padded group
static inline Shift softmax(const float* x, const Layout& k, float* soft) {
  const float largest = max_of(x, k);
  float lanes[kLanes] = {};
  for (int64_t c = 0; c < k.padded; c += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const float e = exp_nonpos(x[c + i] - largest);
      soft[c + i] = e;
      lanes[i] += e;
    }
  }
  const float sum = sum_lanes(lanes), inverse = 1.0f / sum;
  for (int64_t c = 0; c < k.padded; c += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) soft[c + i] *= inverse;
  }
  return {largest, sum};
}

// Turns soft into probs (in place is allowed) and writes their logarithms; padding gets 0 in both.
static inline void mix(const float* x, const Layout& k, Shift shift, const float* soft,
                       float* probs, float* log_probs) {
  if (k.mixed) {
    for (int64_t c = 0; c < k.padded; c += kLanes) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        const float p = k.keep * soft[c + i] + k.share;
        probs[c + i] = p;
        log_probs[c + i] = logf(p);
      }
    }
  } else {
    const float log_sum = logf(shift.sum);
    for (int64_t c = 0; c < k.padded; c += kLanes) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        probs[c + i] = soft[c + i];
        log_probs[c + i] = (x[c + i] - shift.largest) - log_sum;
      }
    }
  }
  for (int64_t c = k.classes; c < k.padded; ++c) probs[c] = log_probs[c] = 0.0f;
}

// The first not-a-number if there is one, else the first of the largest.
static inline int64_t argmax(const float* x, int64_t count) {
  int64_t best = 0;
  for (int64_t c = 1; c < count; ++c) {
    if (x[best] != x[best]) break;
    if (!(x[c] <= x[best])) best = c;
  }
  return best;
}

// The class where the cumulative mass passes `uniform` of the whole.
static inline int64_t pick(const float* probs, const Layout& k, float uniform, float* mass) {
  float sum = 0.0f;
  for (int64_t c = 0; c < k.classes; ++c) mass[c] = sum += probs[c];
  const float threshold = uniform * sum;
  int64_t index = 0;
  for (int64_t c = 0; c < k.classes; ++c) index += mass[c] <= threshold ? 1 : 0;
  return index < k.classes ? index : k.classes - 1;
}

template <class Index>
void latent_sample(const LatentSample& a, Index* index, float* log_probs, int64_t begin,
                   int64_t end) {
  const Layout k = layout_of(a.classes, a.unimix);
  float copy[kMaxClasses], probs[kMaxClasses], logs[kMaxClasses], scratch[kMaxClasses];
  for (int64_t group = begin; group < end; ++group) {
    const float* x = padded_group(a.logits + group * k.classes, k, copy, -INFINITY);
    const Shift shift = softmax(x, k, probs);
    mix(x, k, shift, probs, probs, logs);
    float* out = log_probs + group * k.classes;
    for (int64_t c = 0; c < k.classes; ++c) out[c] = logs[c];
    int64_t chosen;
    if (a.kind == Noise::kUniform) {
      chosen = pick(probs, k, a.noise[group], scratch);
    } else if (a.kind == Noise::kGumbel) {
      const float* noise = a.noise + group * k.classes;
      for (int64_t c = 0; c < k.classes; ++c) scratch[c] = logs[c] + noise[c];
      chosen = argmax(scratch, k.classes);
    } else {
      chosen = argmax(x, k.classes);
    }
    index[group] = static_cast<Index>(chosen);
  }
}

template <class Index>
void one_hot(const Index* index, float* out, int64_t classes, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t chosen = static_cast<int64_t>(index[group]);
    float* row = out + group * classes;
    for (int64_t c = 0; c < classes; ++c) row[c] = 0.0f;
    if (0 <= chosen && chosen < classes) row[chosen] = 1.0f;
  }
}

void latent_backward(const LatentBackward& a, float* grad_logits, int64_t begin, int64_t end) {
  const Layout k = layout_of(a.classes, a.unimix);
  const bool plain_log = a.log && !k.mixed;  // grad - softmax * sum(grad), without dividing by p
  float copy[kMaxClasses], soft[kMaxClasses], grads[kMaxClasses];
  for (int64_t group = begin; group < end; ++group) {
    const float* x = padded_group(a.logits + group * k.classes, k, copy, -INFINITY);
    softmax(x, k, soft);
    const float* grad = a.grad + group * k.classes;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < k.classes; ++c) {
      const float divisor = a.log && k.mixed ? k.keep * soft[c] + k.share : 1.0f;
      const float pull = plain_log ? grad[c] : k.keep * grad[c] / divisor;
      grads[c] = pull;
      dot += plain_log ? pull : soft[c] * pull;
    }
    float* out = grad_logits + group * k.classes;
#pragma omp simd
    for (int64_t c = 0; c < k.classes; ++c) {
      out[c] = plain_log ? grads[c] - soft[c] * dot : soft[c] * (grads[c] - dot);
    }
  }
}

// One distribution of a group: softmax, mixed probabilities and their logarithms.
struct Side {
  float copy[kMaxClasses], soft[kMaxClasses], probs[kMaxClasses], logs[kMaxClasses];
};

static inline void fill_side(const float* x, const Layout& k, Side& side) {
  const float* group = padded_group(x, k, side.copy, -INFINITY);
  const Shift shift = softmax(group, k, side.soft);
  mix(group, k, shift, side.soft, side.probs, side.logs);
}

// d KL / d logits of both sides; p / q is bounded below by the mixture, and cancels without one.
static inline void kl_slopes(const Side& p, const Side& q, const Layout& k, float* slope_post,
                             float* slope_prior) {
  float post_dot = 0.0f, prior_dot = 0.0f;
#pragma omp simd reduction(+ : post_dot, prior_dot)
  for (int64_t c = 0; c < k.classes; ++c) {
    const float ratio = k.mixed ? k.keep * q.soft[c] / q.probs[c] : 1.0f;
    post_dot += p.soft[c] * (p.logs[c] - q.logs[c]);
    prior_dot += ratio * p.probs[c];
  }
#pragma omp simd
  for (int64_t c = 0; c < k.classes; ++c) {
    const float ratio = k.mixed ? k.keep * q.soft[c] / q.probs[c] : 1.0f;
    slope_post[c] = k.keep * p.soft[c] * (p.logs[c] - q.logs[c] - post_dot);
    slope_prior[c] = q.soft[c] * prior_dot - ratio * p.probs[c];
  }
}

void kl_balance(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  const Layout k = layout_of(a.classes, a.unimix);
  const int64_t row_size = a.groups * a.classes;
  Side p, q;
  for (int64_t row = begin; row < end; ++row) {
    float kl[kLanes] = {}, post[kLanes] = {}, prior[kLanes] = {};
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t start = row * row_size + group * a.classes;
      fill_side(a.post + start, k, p);
      fill_side(a.prior + start, k, q);
      for (int64_t c = 0; c < k.padded; c += kLanes) {
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          kl[i] += p.probs[c + i] * (p.logs[c + i] - q.logs[c + i]);
          post[i] -= p.probs[c + i] * p.logs[c + i];
          prior[i] -= q.probs[c + i] * q.logs[c + i];
        }
      }
      if (out.slope_post != nullptr) {
        kl_slopes(p, q, k, out.slope_post + start, out.slope_prior + start);
      }
    }
    const float value = sum_lanes(kl);
    const bool clipped = value < a.free_nats;
    out.dyn[row] = out.rep[row] = clipped ? a.free_nats : value;
    out.post_entropy[row] = sum_lanes(post);
    out.prior_entropy[row] = sum_lanes(prior);
    if (clipped && out.slope_post != nullptr) {
      memset(out.slope_post + row * row_size, 0, row_size * sizeof(float));
      memset(out.slope_prior + row * row_size, 0, row_size * sizeof(float));
    }
  }
}

void scale_rows(const float* factor, const float* x, float* out, int64_t columns, int64_t begin,
                int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float scale = factor[row];
    const float* from = x + row * columns;
    float* to = out + row * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] = scale * from[c];
  }
}

}  // namespace fastwm::FWM_ISA

#endif
