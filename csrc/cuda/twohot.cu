// Two-hot loss and mean: a warp per row of V logits, which it sweeps two or three times; after the
// first sweep the row lies in the first-level cache. The backward passes compute the softmax again.
#include "cuda/twohot.h"

#include "cuda/warps.cuh"

namespace fastwm::cuda {
namespace {

template <class T>
__device__ float row_max(const T* x, int64_t count) {
  float largest = -INFINITY;
  FWM_LANE_STRIDE(v, count) largest = fmaxf(largest, widen(x[v]));
  return warp_max(largest);
}

struct Pick {
  int64_t below, above;
  float to_below, to_above;
};

// The bins around a target; counting keeps the meaning of `bins <= target` to the last bit.
__device__ Pick two_hot(const float* bins, int64_t count, float target) {
  int mine = 0;
  FWM_LANE_STRIDE(v, count) mine += bins[v] <= target ? 1 : 0;
  const int64_t passed = warp_count(mine);
  // Not a number is neither below nor above any bin: from the first bin to the last, weights NaN.
  const int64_t over = target == target ? count - passed : 0;
  Pick pick{passed > 0 ? passed - 1 : 0, over > 0 ? count - over : count - 1, 0.0f, 0.0f};
  const bool same = pick.below == pick.above;
  const float below = same ? 1.0f : fabsf(bins[pick.below] - target);
  const float above = same ? 1.0f : fabsf(bins[pick.above] - target);
  pick.to_below = above / (below + above);
  pick.to_above = below / (below + above);
  return pick;
}

template <class T>
__global__ void loss_kernel(TwohotLoss<T> a, float* __restrict__ loss, float* __restrict__ exp_sum,
                            int64_t rows) {
  FWM_WARP_STRIDE(row, rows) {
    const T* x = a.logits + row * a.count;
    const float largest = row_max(x, a.count);
    float sum = 0.0f, total = 0.0f;
    FWM_LANE_STRIDE(v, a.count) sum += expf(widen(x[v]) - largest);
    sum = warp_sum(sum);
    const float log_sum = logf(sum);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (a.target[k] == nullptr) break;
      const Pick p = two_hot(a.bins, a.count, a.target[k][row]);
      total += a.weight[k] * (p.to_below * ((largest - widen(x[p.below])) + log_sum) +
                              p.to_above * ((largest - widen(x[p.above])) + log_sum));
    }
    if (threadIdx.x % kWarpThreads == 0) {
      loss[row] = total;
      exp_sum[row] = sum;
    }
  }
}

template <class T>
__global__ void loss_backward_kernel(TwohotLoss<T> a, T* __restrict__ grad_logits, int64_t rows) {
  const int targets = a.target[1] != nullptr ? 2 : 1;
  const float weights = a.weight[0] + (targets == 2 ? a.weight[1] : 0.0f);
  FWM_WARP_STRIDE(row, rows) {
    const T* x = a.logits + row * a.count;
    const float grad = a.grad_loss[row], factor = grad * weights / a.exp_sum[row];
    const float largest = row_max(x, a.count);
    Pick pick[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k < targets) pick[k] = two_hot(a.bins, a.count, a.target[k][row]);
    }
    FWM_LANE_STRIDE(v, a.count) {
      float out = factor * expf(widen(x[v]) - largest);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k >= targets) break;
        if (v == pick[k].below) out -= grad * a.weight[k] * pick[k].to_below;
        if (v == pick[k].above) out -= grad * a.weight[k] * pick[k].to_above;
      }
      narrow(out, grad_logits[row * a.count + v]);
    }
  }
}

// Softmax sum, and the mean as a sum over the positive bins of bin * (p - p_mirrored).
struct Moments {
  float largest, sum, mean;
};

template <class T>
__device__ Moments moments(const T* x, const float* bins, int64_t count) {
  const int64_t half = count / 2;
  const float largest = row_max(x, count);
  float sum = 0.0f, mean = 0.0f;
  FWM_LANE_STRIDE(v, count) sum += expf(widen(x[v]) - largest);
  FWM_LANE_STRIDE(i, half) {
    const int64_t upper = count - half + i;
    mean +=
        bins[upper] * (expf(widen(x[upper]) - largest) - expf(widen(x[half - 1 - i]) - largest));
  }
  sum = warp_sum(sum);
  return {largest, sum, warp_sum(mean) / sum};
}

template <class T>
__global__ void mean_kernel(TwohotMean<T> a, float* __restrict__ mean, int64_t rows) {
  FWM_WARP_STRIDE(row, rows) {
    const Moments m = moments(a.logits + row * a.count, a.bins, a.count);
    if (threadIdx.x % kWarpThreads == 0) mean[row] = m.mean;
  }
}

template <class T>
__global__ void mean_backward_kernel(TwohotMean<T> a, T* __restrict__ grad_logits, int64_t rows) {
  const int64_t half = a.count / 2;
  FWM_WARP_STRIDE(row, rows) {
    const T* x = a.logits + row * a.count;
    const Moments m = moments(x, a.bins, a.count);
    const float factor = a.grad_mean[row] / m.sum;
    FWM_LANE_STRIDE(v, a.count) {
      float bin = 0.0f;  // what this bin counts for in the mean: its mirror's negative, 0 if none
      if (v >= a.count - half) bin = a.bins[v];
      if (v < half) bin = -a.bins[a.count - 1 - v];
      narrow(factor * (bin - m.mean) * expf(widen(x[v]) - m.largest),
             grad_logits[row * a.count + v]);
    }
  }
}

}  // namespace

template <class T>
cudaError_t twohot_loss(const TwohotLoss<T>& a, float* loss, float* exp_sum, int64_t rows,
                        cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  loss_kernel<T><<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, loss, exp_sum, rows);
  return cudaGetLastError();
}

template <class T>
cudaError_t twohot_loss_backward(const TwohotLoss<T>& a, T* grad_logits, int64_t rows,
                                 cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  loss_backward_kernel<T><<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, grad_logits, rows);
  return cudaGetLastError();
}

template <class T>
cudaError_t twohot_mean(const TwohotMean<T>& a, float* mean, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  mean_kernel<T><<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, mean, rows);
  return cudaGetLastError();
}

template <class T>
cudaError_t twohot_mean_backward(const TwohotMean<T>& a, T* grad_logits, int64_t rows,
                                 cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  mean_backward_kernel<T><<<blocks_for_warps(rows), kThreads, 0, stream>>>(a, grad_logits, rows);
  return cudaGetLastError();
}

#define FWM_TWOHOT(T)                                                                            \
  template cudaError_t twohot_loss(const TwohotLoss<T>&, float*, float*, int64_t, cudaStream_t); \
  template cudaError_t twohot_loss_backward(const TwohotLoss<T>&, T*, int64_t, cudaStream_t);    \
  template cudaError_t twohot_mean(const TwohotMean<T>&, float*, int64_t, cudaStream_t);         \
  template cudaError_t twohot_mean_backward(const TwohotMean<T>&, T*, int64_t, cudaStream_t);
FWM_TWOHOT(float)
FWM_TWOHOT(Bf16)
#undef FWM_TWOHOT

}  // namespace fastwm::cuda
