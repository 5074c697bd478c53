// Categorical latents: eight lanes per group of K classes, four groups per warp. All lanes of a
// warp stay together: lanes without a group repeat the last one and write nothing.
#include "cuda/latent.h"

#include "cuda/warps.cuh"

namespace fastwm::cuda {
namespace {

constexpr int kTeam = 8;  // lanes per group
constexpr int kTeams = kWarpThreads / kTeam;

// for (int c : each class of this lane); neighbouring lanes have neighbouring classes
#define FWM_CLASSES(c, count) for (int64_t c = threadIdx.x % kTeam; c < (count); c += kTeam)

// p = keep * softmax + share
struct Mixing {
  float keep, share;
  bool mixed;
  __device__ Mixing(int64_t classes, float unimix)
      : keep(1.0f - unimix), share(unimix / static_cast<float>(classes)), mixed(unimix != 0.0f) {}
};

// One categorical distribution, computed from its logits as it is asked for.
struct Side {
  const float* x;
  float largest, inverse, log_sum;

  __device__ Side(const float* logits, int64_t classes) : x(logits), largest(-INFINITY) {
    FWM_CLASSES(c, classes) largest = fmaxf(largest, x[c]);
    largest = lanes_max(largest, kTeam);
    float sum = 0.0f;
    FWM_CLASSES(c, classes) sum += expf(x[c] - largest);
    sum = lanes_sum(sum, kTeam);
    inverse = 1.0f / sum;
    log_sum = logf(sum);
  }
  __device__ float soft(int64_t c) const { return expf(x[c] - largest) * inverse; }
  __device__ float prob(int64_t c, const Mixing& m) const {
    return m.mixed ? m.keep * soft(c) + m.share : soft(c);
  }
  __device__ float log_prob(int64_t c, const Mixing& m) const {
    return m.mixed ? logf(prob(c, m)) : (x[c] - largest) - log_sum;
  }
};

// ---- sampling

struct Best {
  float value;
  int64_t index;  // -1: none yet
};

// A not-a-number before all numbers, then the larger, then the first.
__device__ bool better(const Best& a, const Best& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.index < b.index);
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

__device__ int64_t team_best(Best mine) {
#pragma unroll
  for (int offset = kTeam / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, mine.value, offset),
                     __shfl_xor_sync(kAllLanes, mine.index, offset)};
    if (better(other, mine)) mine = other;
  }
  return mine.index;
}

// The class where the cumulative mass passes `uniform` of the whole. Every lane adds a run of
// classes in order and hands on the very sum it ended with, so that a class of no mass adds exactly
// nothing and cannot be drawn.
__device__ int64_t pick(const Side& side, const Mixing& m, int64_t classes, float uniform) {
  const int lane = threadIdx.x % kTeam;
  const int64_t run = (classes + kTeam - 1) / kTeam;
  const int64_t begin = lane * run < classes ? lane * run : classes;
  const int64_t end = begin + run < classes ? begin + run : classes;
  float start = 0.0f, total = 0.0f;
  for (int from = 0; from < kTeam; ++from) {
    float mass = start;
    if (from == lane) {
      for (int64_t c = begin; c < end; ++c) mass += side.prob(c, m);
    }
    total = __shfl_sync(kAllLanes, mass, from, kTeam);
    if (lane == from + 1) start = total;
  }
  const float threshold = uniform * total;
  int passed = 0;
  float mass = start;
  for (int64_t c = begin; c < end; ++c) passed += (mass += side.prob(c, m)) <= threshold ? 1 : 0;
#pragma unroll
  for (int offset = kTeam / 2; offset > 0; offset /= 2) {
    passed += __shfl_xor_sync(kAllLanes, passed, offset);
  }
  return passed < classes ? passed : classes - 1;
}

__device__ int64_t choose(const LatentSample& a, const Side& side, const Mixing& m, int64_t group) {
  if (a.kind == Noise::kUniform) return pick(side, m, a.classes, a.noise[group]);
  Best best{0.0f, -1};
  FWM_CLASSES(c, a.classes) {
    const float value =
        a.kind == Noise::kGumbel ? side.log_prob(c, m) + a.noise[group * a.classes + c] : side.x[c];
    if (better({value, c}, best)) best = {value, c};
  }
  return team_best(best);
}

// for (int64_t base : the first of the groups that this warp takes at once)
#define FWM_TEAM_STRIDE(base, groups)                                                             \
  for (int64_t base =                                                                             \
           (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads * kTeams; \
       base < (groups);                                                                           \
       base += static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpThreads * kTeams)

// The group of this thread's team; `valid`: not a repetition of the last one.
struct Mine {
  bool valid;
  int64_t group;
  __device__ Mine(int64_t base, int64_t groups)
      : valid(base + threadIdx.x % kWarpThreads / kTeam < groups),
        group(valid ? base + threadIdx.x % kWarpThreads / kTeam : groups - 1) {}
};

template <class Index>
__global__ void sample_kernel(LatentSample a, Index* __restrict__ index,
                              float* __restrict__ log_probs, int64_t groups) {
  const Mixing m(a.classes, a.unimix);
  FWM_TEAM_STRIDE(base, groups) {
    const Mine mine(base, groups);
    const int64_t group = mine.group;
    const Side side(a.logits + group * a.classes, a.classes);
    const int64_t chosen = choose(a, side, m, group);
    if (mine.valid) {
      FWM_CLASSES(c, a.classes) log_probs[group * a.classes + c] = side.log_prob(c, m);
      if (threadIdx.x % kTeam == 0) index[group] = static_cast<Index>(chosen);
    }
  }
}

template <class Index>
__global__ void one_hot_kernel(const Index* __restrict__ index, float* __restrict__ out,
                               int64_t classes, int64_t count) {
  FWM_GRID_STRIDE(i, count) {
    out[i] = static_cast<int64_t>(index[i / classes]) == i % classes ? 1.0f : 0.0f;
  }
}

// ---- gradient of p or log p

__global__ void backward_kernel(LatentBackward a, float* __restrict__ grad_logits, int64_t groups) {
  const Mixing m(a.classes, a.unimix);
  const bool plain_log = a.log && !m.mixed;  // grad - softmax * sum(grad), without dividing by p
  FWM_TEAM_STRIDE(base, groups) {
    const Mine mine(base, groups);
    const int64_t group = mine.group;
    const Side side(a.logits + group * a.classes, a.classes);
    const float* grad = a.grad + group * a.classes;
    const auto pull = [&](int64_t c) {
      const float divisor = a.log && m.mixed ? side.prob(c, m) : 1.0f;
      return m.keep * grad[c] / divisor;
    };
    float dot = 0.0f;
    FWM_CLASSES(c, a.classes) dot += plain_log ? pull(c) : side.soft(c) * pull(c);
    dot = lanes_sum(dot, kTeam);
    if (mine.valid) {
      FWM_CLASSES(c, a.classes) {
        const float soft = side.soft(c);
        grad_logits[group * a.classes + c] =
            plain_log ? pull(c) - soft * dot : soft * (pull(c) - dot);
      }
    }
  }
}

// ---- KL balance: a warp per row

// kl and entropies of this lane's classes
struct Terms {
  float kl = 0.0f, post = 0.0f, prior = 0.0f;
};

__device__ void add_terms(const Side& p, const Side& q, const Mixing& m, int64_t classes,
                          Terms& sum) {
  FWM_CLASSES(c, classes) {
    const float prob = p.prob(c, m), other = q.prob(c, m);
    const float log_p = p.log_prob(c, m), log_q = q.log_prob(c, m);
    sum.kl += prob * (log_p - log_q);
    sum.post -= prob * log_p;
    sum.prior -= other * log_q;
  }
}

// d KL / d logits of both sides; p / q is bounded below by the mixture, and cancels without one.
__device__ void write_slopes(const Side& p, const Side& q, const Mixing& m, int64_t classes,
                             bool valid, float* slope_post, float* slope_prior) {
  const auto pull = [&](int64_t c) {
    const float ratio = m.mixed ? m.keep * q.soft(c) / q.prob(c, m) : 1.0f;
    return ratio * p.prob(c, m);
  };
  float post_dot = 0.0f, prior_dot = 0.0f;
  FWM_CLASSES(c, classes) {
    post_dot += p.soft(c) * (p.log_prob(c, m) - q.log_prob(c, m));
    prior_dot += pull(c);
  }
  post_dot = lanes_sum(post_dot, kTeam);
  prior_dot = lanes_sum(prior_dot, kTeam);
  if (!valid) return;
  FWM_CLASSES(c, classes) {
    const float gap = p.log_prob(c, m) - q.log_prob(c, m);
    slope_post[c] = m.keep * p.soft(c) * (gap - post_dot);
    slope_prior[c] = q.soft(c) * prior_dot - pull(c);
  }
}

__global__ void kl_kernel(KlBalance a, KlOutputs out, int64_t rows) {
  const Mixing m(a.classes, a.unimix);
  const int64_t row_size = a.groups * a.classes;
  FWM_WARP_STRIDE(row, rows) {
    Terms sum;
    for (int64_t base = 0; base < a.groups; base += kTeams) {
      const Mine mine(base, a.groups);
      const int64_t start = row * row_size + mine.group * a.classes;
      const Side p(a.post + start, a.classes), q(a.prior + start, a.classes);
      if (mine.valid) add_terms(p, q, m, a.classes, sum);
      if (out.slope_post != nullptr) {
        write_slopes(p, q, m, a.classes, mine.valid, out.slope_post + start,
                     out.slope_prior + start);
      }
    }
    const float value = warp_sum(sum.kl), post = warp_sum(sum.post), prior = warp_sum(sum.prior);
    const bool clipped = value < a.free_nats;
    if (threadIdx.x % kWarpThreads == 0) {
      out.dyn[row] = out.rep[row] = clipped ? a.free_nats : value;
      out.post_entropy[row] = post;
      out.prior_entropy[row] = prior;
    }
    if (clipped && out.slope_post != nullptr) {
      __syncwarp();  // other lanes' slopes are written
      FWM_LANE_STRIDE(i, row_size) {
        out.slope_post[row * row_size + i] = 0.0f;
        out.slope_prior[row * row_size + i] = 0.0f;
      }
    }
  }
}

__global__ void scale_kernel(const float* __restrict__ factor, const float* __restrict__ x,
                             float* __restrict__ out, int64_t columns, int64_t count) {
  FWM_GRID_STRIDE(i, count) out[i] = factor[i / columns] * x[i];
}

unsigned blocks_for_groups(int64_t groups) {
  return blocks_for_warps((groups + kTeams - 1) / kTeams);
}

}  // namespace

template <class Index>
cudaError_t latent_sample(const LatentSample& a, Index* index, float* log_probs, int64_t groups,
                          cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  sample_kernel<Index>
      <<<blocks_for_groups(groups), kThreads, 0, stream>>>(a, index, log_probs, groups);
  return cudaGetLastError();
}

template <class Index>
cudaError_t one_hot(const Index* index, float* out, int64_t classes, int64_t groups,
                    cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  const int64_t count = groups * classes;
  one_hot_kernel<Index><<<blocks_for(count), kThreads, 0, stream>>>(index, out, classes, count);
  return cudaGetLastError();
}

template cudaError_t latent_sample(const LatentSample&, uint8_t*, float*, int64_t, cudaStream_t);
template cudaError_t latent_sample(const LatentSample&, int64_t*, float*, int64_t, cudaStream_t);
template cudaError_t one_hot(const uint8_t*, float*, int64_t, int64_t, cudaStream_t);
template cudaError_t one_hot(const int64_t*, float*, int64_t, int64_t, cudaStream_t);

cudaError_t latent_backward(const LatentBackward& a, float* grad_logits, int64_t groups,
                            cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  backward_kernel<<<blocks_for_groups(groups), kThreads, 0, stream>>>(a, grad_logits, groups);
  return cudaGetLastError();
}

cudaError_t kl_balance(const KlBalance& a, const KlOutputs& out, int64_t rows,
                       cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  kl_kernel<<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, out, rows);
  return cudaGetLastError();
}

cudaError_t scale_rows(const float* factor, const float* x, float* out, int64_t columns,
                       int64_t rows, cudaStream_t stream) {
  const int64_t count = rows * columns;
  if (count == 0) return cudaSuccess;
  scale_kernel<<<blocks_for(count), kThreads, 0, stream>>>(factor, x, out, columns, count);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
