// Negative log-likelihood of mixtures. "factored": a thread per latent, which walks over its few
// components. "joint": a warp per row; lanes share the latents, lane m and m - 32 keep component m.
// The backward passes compute everything again from the inputs.
#include "cuda/gmm.h"

#include "cuda/warps.cuh"

namespace fastwm::cuda {
namespace {

constexpr float kHalfLogTwoPi = 0.918938533f;
constexpr float kLowest = -3.40282347e38f;  // a maximum that can be subtracted from -inf
constexpr float kSmallest = 1.17549435e-38f;
static_assert(kMaxComponents <= 2 * kWarpThreads);

__device__ __forceinline__ float z_of(float target, float mean, float log_std, float* inverse) {
  *inverse = expf(-gmm_log_std(log_std));
  return (target - mean) * *inverse;
}

__device__ __forceinline__ float joint_of(float target, float mean, float log_std, float logit) {
  float inverse;
  const float z = z_of(target, mean, log_std, &inverse);
  return gmm_joint(logit, gmm_log_std(log_std), z);
}

// Maxima and sums of exponentials of the logits and of logit + log density.
struct Sums {
  float logit_max, joint_max, logit_sum, joint_sum;

  __device__ float nll(float constant) const {
    const float likely = joint_sum < kSmallest ? kSmallest : joint_sum;  // not a number stays
    return (logit_max - joint_max) + (logf(logit_sum) - logf(likely)) + constant;
  }
  __device__ float joint_scale(float grad) const {
    return joint_sum == 0.0f ? 0.0f : grad / joint_sum;
  }
};

// ---- factored

struct Factored {
  const float *mean, *log_std, *logits;  // (M) each
  float target;
  int64_t components;

  __device__ Factored(const GmmNll& a, int64_t i) : target(a.target[i]), components(a.components) {
    const int64_t row = i / a.latents, at = i % a.latents * a.components;
    mean = a.mean.data + row * a.mean.stride + at;
    log_std = a.log_std.data + row * a.log_std.stride + at;
    logits = a.logits.data + row * a.logits.stride + at;
  }
  __device__ float joint(int64_t m) const {
    return joint_of(target, mean[m], log_std[m], logits[m]);
  }
  __device__ Sums sums() const {
    Sums s{kLowest, kLowest, 0.0f, 0.0f};
    for (int64_t m = 0; m < components; ++m) {
      s.logit_max = fmaxf(s.logit_max, logits[m]);
      s.joint_max = fmaxf(s.joint_max, joint(m));
    }
    for (int64_t m = 0; m < components; ++m) {
      s.logit_sum += expf(logits[m] - s.logit_max);
      s.joint_sum += expf(joint(m) - s.joint_max);
    }
    return s;
  }
};

__global__ void factored_kernel(GmmNll a, float* __restrict__ nll, int64_t count) {
  FWM_GRID_STRIDE(i, count) nll[i] = Factored(a, i).sums().nll(kHalfLogTwoPi);
}

__global__ void factored_backward_kernel(GmmNll a, GmmGrads out, int64_t count) {
  FWM_GRID_STRIDE(i, count) {
    const Factored f(a, i);
    const Sums s = f.sums();
    const float grad = a.grad_nll[i], scale = s.joint_scale(grad);
    for (int64_t m = 0; m < a.components; ++m) {
      const int64_t at = i * a.components + m;
      float inverse;
      const float z = z_of(f.target, f.mean[m], f.log_std[m], &inverse);
      const float share = expf(f.joint(m) - s.joint_max) * scale;
      out.logits[at] = expf(f.logits[m] - s.logit_max) * (grad / s.logit_sum) - share;
      out.mean[at] = gmm_grad_mean(share, z, inverse);
      out.log_std[at] = gmm_grad_log_std(share, z);
    }
  }
}

// ---- joint

// A row's warp: each lane's components are lane and lane + 32.
struct Joint {
  const float *target, *mean, *log_std, *logits;
  int64_t latents, components;
  float logit[2], joint[2];
  Sums sums;

  __device__ Joint(const GmmNll& a, int64_t row)
      : target(a.target + row * a.latents),
        mean(a.mean.data + row * a.mean.stride),
        log_std(a.log_std.data + row * a.log_std.stride),
        logits(a.logits.data + row * a.logits.stride),
        latents(a.latents),
        components(a.components) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = half * kWarpThreads + lane;
      logit[half] = m < components ? logits[m] : -INFINITY;
      joint[half] = -INFINITY;
      for (int64_t from = 0; from < kWarpThreads; ++from) {
        if (half * kWarpThreads + from >= components) break;
        const float density = log_density(half * kWarpThreads + from);
        if (from == lane) joint[half] = logit[half] + density;
      }
    }
    sums.logit_max = fmaxf(kLowest, warp_max(fmaxf(logit[0], logit[1])));
    sums.joint_max = fmaxf(kLowest, warp_max(fmaxf(joint[0], joint[1])));
    sums.logit_sum = warp_sum(expf(logit[0] - sums.logit_max) + expf(logit[1] - sums.logit_max));
    sums.joint_sum = warp_sum(expf(joint[0] - sums.joint_max) + expf(joint[1] - sums.joint_max));
  }
  // The same in all lanes.
  __device__ float log_density(int64_t m) const {
    float sum = 0.0f;
    FWM_LANE_STRIDE(i, latents) {
      sum += joint_of(target[i], mean[m * latents + i], log_std[m * latents + i], 0.0f);
    }
    return warp_sum(sum);
  }
};

__global__ void joint_kernel(GmmNll a, float* __restrict__ nll, int64_t rows) {
  const float constant = kHalfLogTwoPi * static_cast<float>(a.latents);
  FWM_WARP_STRIDE(row, rows) {
    const Joint j(a, row);
    if (threadIdx.x % kWarpThreads == 0) nll[row] = j.sums.nll(constant);
  }
}

__global__ void joint_backward_kernel(GmmNll a, GmmGrads out, int64_t rows) {
  FWM_WARP_STRIDE(row, rows) {
    const Joint j(a, row);
    const float grad = a.grad_nll[row], scale = j.sums.joint_scale(grad);
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mine = expf(j.joint[half] - j.sums.joint_max) * scale;
      const int64_t own = half * kWarpThreads + lane;
      if (own < a.components) {
        out.logits[row * a.components + own] =
            expf(j.logit[half] - j.sums.logit_max) * (grad / j.sums.logit_sum) - mine;
      }
      for (int from = 0; from < kWarpThreads; ++from) {
        const int64_t m = half * kWarpThreads + from;
        if (m >= a.components) break;
        const float share = __shfl_sync(kAllLanes, mine, from);
        FWM_LANE_STRIDE(i, a.latents) {
          const int64_t in = m * a.latents + i, at = row * a.components * a.latents + in;
          float inverse;
          const float z = z_of(j.target[i], j.mean[in], j.log_std[in], &inverse);
          out.mean[at] = gmm_grad_mean(share, z, inverse);
          out.log_std[at] = gmm_grad_log_std(share, z);
        }
      }
    }
  }
}

}  // namespace

cudaError_t gmm_joint_nll(const GmmNll& a, float* nll, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  joint_kernel<<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, nll, rows);
  return cudaGetLastError();
}

cudaError_t gmm_joint_backward(const GmmNll& a, const GmmGrads& out, int64_t rows,
                               cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  joint_backward_kernel<<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, out, rows);
  return cudaGetLastError();
}

cudaError_t gmm_factored_nll(const GmmNll& a, float* nll, int64_t rows, cudaStream_t stream) {
  const int64_t count = rows * a.latents;
  if (count == 0) return cudaSuccess;
  factored_kernel<<<blocks_for(count), kThreads, 0, stream>>>(a, nll, count);
  return cudaGetLastError();
}

cudaError_t gmm_factored_backward(const GmmNll& a, const GmmGrads& out, int64_t rows,
                                  cudaStream_t stream) {
  const int64_t count = rows * a.latents;
  if (count == 0) return cudaSuccess;
  factored_backward_kernel<<<blocks_for(count), kThreads, 0, stream>>>(a, out, count);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
