// Categorical latents, one group of K classes at a time in vectors of 16. A group that does not fill
// its vectors is read with a mask and padded with -inf, whose probability is exactly 0. The common
// paddings are compile-time constants, so that a group stays in registers.
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
  if (a.classes <= kTileClasses && a.groups > 0) {
    kl_tiles(a, out, begin, end);
  } else {
    FWM_CALL(kl_balance)(a, out, begin, end);
  }
}

void scale_rows(const float* factor, const float* x, float* out, int64_t columns, int64_t begin,
                int64_t end) {
  FWM_CALL(scale_rows)(factor, x, out, columns, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

#ifndef FWM_LATENT_PADDED  // calls f<padding> for the group size; 0: any, known at run time only
#define FWM_LATENT_PADDED(classes, call)        \
  switch (((classes) + 15) / 16) {              \
    case 1: call(16); break;                    \
    case 2: call(32); break;                    \
    case 4: call(64); break;                    \
    default: call(0);                           \
  }
#endif

// How K classes lie in whole vectors, and how the softmax is mixed with the uniform distribution.
template <int P>
struct Layout {
  static constexpr int kRoom = P > 0 ? P : static_cast<int>(kMaxClasses);
  int classes, run_time_padded;
  float keep, share;  // p = keep * softmax + share
  bool mixed;

  Layout(int64_t count, float unimix)
      : classes(static_cast<int>(count)),
        run_time_padded((static_cast<int>(count) + 15) / 16 * 16),
        keep(1.0f - unimix),
        share(unimix / static_cast<float>(count)),
        mixed(unimix != 0.0f) {}
  int padded() const { return P > 0 ? P : run_time_padded; }
};

// One categorical distribution: softmax, mixed probabilities and their logarithms; padding has 0.
template <int P>
struct Side {
  float soft[Layout<P>::kRoom], probs[Layout<P>::kRoom], logs[Layout<P>::kRoom];
};

// soft = exp(x - max) / sum, logs = (x - max) - log(sum)
template <int P>
FWM_HD void softmax(const float* x, const Layout<P>& k, Side<P>& side) {
  float largest = -INFINITY, lanes[16] = {};
#pragma omp simd reduction(max : largest)
  for (int c = 0; c < k.padded(); ++c) {
    const float logit = c < k.classes ? x[c] : -INFINITY;
    side.logs[c] = logit;
    largest = logit > largest ? logit : largest;
  }
  for (int c = 0; c < k.padded(); c += 16) {
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      side.logs[c + i] -= largest;
      side.soft[c + i] = exp_nonpos(side.logs[c + i]);
      lanes[i] += side.soft[c + i];
    }
  }
  const float sum = sum16(lanes);
  const float inverse = 1.0f / sum, log_sum = k.mixed ? 0.0f : logf(sum);
#pragma omp simd
  for (int c = 0; c < k.padded(); ++c) {
    side.soft[c] *= inverse;
    side.logs[c] -= log_sum;
  }
}

template <int P>
FWM_HD void fill_side(const float* x, const Layout<P>& k, Side<P>& side) {
  softmax(x, k, side);
  if (k.mixed) {
#pragma omp simd
    for (int c = 0; c < k.padded(); ++c) {
      const float p = k.keep * side.soft[c] + k.share, log_p = logf(p);
      side.probs[c] = c < k.classes ? p : 0.0f;
      side.logs[c] = c < k.classes ? log_p : 0.0f;
    }
  } else {
#pragma omp simd
    for (int c = 0; c < k.padded(); ++c) {
      side.probs[c] = side.soft[c];
      side.logs[c] = c < k.classes ? side.logs[c] : 0.0f;
    }
  }
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
static inline int64_t pick(const float* probs, int64_t count, float uniform, float* mass) {
  float sum = 0.0f;
  for (int64_t c = 0; c < count; ++c) mass[c] = sum += probs[c];
  const float threshold = uniform * sum;
  int32_t index = 0;
#pragma omp simd reduction(+ : index)
  for (int64_t c = 0; c < count; ++c) index += mass[c] <= threshold ? 1 : 0;
  return index < count ? index : count - 1;
}

template <int P, class Index>
static void sample_groups(const LatentSample& a, Index* index, float* log_probs, int64_t begin,
                          int64_t end) {
  const Layout<P> k(a.classes, a.unimix);
  Side<P> side;
  float scratch[Layout<P>::kRoom];
  for (int64_t group = begin; group < end; ++group) {
    const float* x = a.logits + group * a.classes;
    fill_side(x, k, side);
    float* out = log_probs + group * a.classes;
    for (int c = 0; c < k.classes; ++c) out[c] = side.logs[c];
    int64_t chosen;
    if (a.kind == Noise::kUniform) {
      chosen = pick(side.probs, a.classes, a.noise[group], scratch);
    } else if (a.kind == Noise::kGumbel) {
      const float* noise = a.noise + group * a.classes;
      for (int c = 0; c < k.classes; ++c) scratch[c] = side.logs[c] + noise[c];
      chosen = argmax(scratch, a.classes);
    } else {
      chosen = argmax(x, a.classes);
    }
    index[group] = static_cast<Index>(chosen);
  }
}

template <class Index>
void latent_sample(const LatentSample& a, Index* index, float* log_probs, int64_t begin,
                   int64_t end) {
#define FWM_CALL_PADDED(P) sample_groups<P>(a, index, log_probs, begin, end)
  FWM_LATENT_PADDED(a.classes, FWM_CALL_PADDED)
#undef FWM_CALL_PADDED
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

template <int P>
static void backward_groups(const LatentBackward& a, float* grad_logits, int64_t begin,
                            int64_t end) {
  const Layout<P> k(a.classes, a.unimix);
  const bool plain_log = a.log && !k.mixed;  // grad - softmax * sum(grad), without dividing by p
  Side<P> side;
  for (int64_t group = begin; group < end; ++group) {
    softmax(a.logits + group * a.classes, k, side);
    const float* grad = a.grad + group * a.classes;
    float lanes[16] = {};
    for (int c = 0; c < k.padded(); c += 16) {
#pragma omp simd
      for (int i = 0; i < 16; ++i) {
        const float upstream = c + i < k.classes ? grad[c + i] : 0.0f, soft = side.soft[c + i];
        const float divisor = a.log && k.mixed ? k.keep * soft + k.share : 1.0f;
        const float pull = k.keep * upstream / divisor;
        side.probs[c + i] = pull;
        lanes[i] += plain_log ? pull : soft * pull;
      }
    }
    const float dot = sum16(lanes);
    float* out = grad_logits + group * a.classes;
#pragma omp simd
    for (int c = 0; c < k.padded(); ++c) {
      const float pull = side.probs[c], soft = side.soft[c];
      if (c < k.classes) out[c] = plain_log ? pull - soft * dot : soft * (pull - dot);
    }
  }
}

void latent_backward(const LatentBackward& a, float* grad_logits, int64_t begin, int64_t end) {
#define FWM_CALL_PADDED(P) backward_groups<P>(a, grad_logits, begin, end)
  FWM_LATENT_PADDED(a.classes, FWM_CALL_PADDED)
#undef FWM_CALL_PADDED
}

// d KL / d logits of both sides; p / q is bounded below by the mixture, and cancels without one.
template <int P>
FWM_HD void kl_slopes(Side<P>& p, Side<P>& q, const Layout<P>& k, float* slope_post,
                      float* slope_prior) {
  float post_lanes[16] = {}, prior_lanes[16] = {};
  for (int c = 0; c < k.padded(); c += 16) {
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const float gap = p.logs[c + i] - q.logs[c + i], soft = q.soft[c + i];
      const float ratio = k.mixed ? k.keep * soft / (k.keep * soft + k.share) : 1.0f;
      const float pull = ratio * p.probs[c + i];
      p.logs[c + i] = gap;
      q.logs[c + i] = pull;
      post_lanes[i] += p.soft[c + i] * gap;
      prior_lanes[i] += pull;
    }
  }
  const float post_dot = sum16(post_lanes), prior_dot = sum16(prior_lanes);
#pragma omp simd
  for (int c = 0; c < k.padded(); ++c) {
    const float post = k.keep * p.soft[c] * (p.logs[c] - post_dot);
    const float prior = q.soft[c] * prior_dot - q.logs[c];
    if (c < k.classes) {
      slope_post[c] = post;
      slope_prior[c] = prior;
    }
  }
}

// kl, post entropy and prior entropy of a group, added lane by lane
template <int P>
FWM_HD void add_kl(const Side<P>& p, const Side<P>& q, const Layout<P>& k, float (*lanes)[16]) {
  for (int c = 0; c < k.padded(); c += 16) {
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      lanes[0][i] += p.probs[c + i] * (p.logs[c + i] - q.logs[c + i]);
      lanes[1][i] -= p.probs[c + i] * p.logs[c + i];
      lanes[2][i] -= q.probs[c + i] * q.logs[c + i];
    }
  }
}

template <int P>
static void kl_rows(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  const Layout<P> k(a.classes, a.unimix);
  const int64_t row_size = a.groups * a.classes;
  const bool slopes = out.slope_post != nullptr;
  Side<P> p, q;
  for (int64_t row = begin; row < end; ++row) {
    float lanes[3][16] = {};
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t start = row * row_size + group * a.classes;
      fill_side(a.post + start, k, p);
      fill_side(a.prior + start, k, q);
      add_kl(p, q, k, lanes);
      if (slopes) kl_slopes(p, q, k, out.slope_post + start, out.slope_prior + start);
    }
    const float value = sum16(lanes[0]);
    const bool clipped = value < a.free_nats;
    out.dyn[row] = out.rep[row] = clipped ? a.free_nats : value;
    out.post_entropy[row] = sum16(lanes[1]);
    out.prior_entropy[row] = sum16(lanes[2]);
    if (clipped && slopes) {
      memset(out.slope_post + row * row_size, 0, row_size * sizeof(float));
      memset(out.slope_prior + row * row_size, 0, row_size * sizeof(float));
    }
  }
}

void kl_balance(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
#define FWM_CALL_PADDED(P) kl_rows<P>(a, out, begin, end)
  FWM_LATENT_PADDED(a.classes, FWM_CALL_PADDED)
#undef FWM_CALL_PADDED
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
