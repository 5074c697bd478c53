// LayerNorm over the three parts of a dense GRU and its gates: a block per row, which reads the row
// three times (mean, variance, gates), from cache but for the first. The gradients of scale and
// shift are sums over rows: ranges of rows in parallel, then the ranges in order, so that two runs
// are equal bit by bit.
#include "cuda/rssm_layernorm.h"

#include "cuda/rows.cuh"

namespace fastwm::cuda {
namespace {

constexpr int64_t kMaxRanges = 64;

struct Moments {
  float mean, inverse;  // inverse: 1 / standard deviation
};

// By the whole block.
__device__ Moments moments_of(const float* x, int64_t count, float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += x[i];
  const float mean = block_sum(sum) / static_cast<float>(count);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(block_sum(squares) / static_cast<float>(count) + eps)};
}

// One of the three parts behind the norm, before its nonlinearity.
__device__ float gate(const GruLayerNorm& a, const float* x, const Moments& m, int64_t i) {
  return (x[i] - m.mean) * m.inverse * a.scale[i] + a.shift[i];
}

__global__ void forward_kernel(GruLayerNorm a, float* __restrict__ out, int64_t rows) {
  const int64_t d = a.width;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float *x = a.parts + row * 3 * d, *deter = a.deter + row * d;
    const Moments m = moments_of(x, 3 * d, a.eps);
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      out[row * d + i] =
          gru_gate(gate(a, x, m, i), gate(a, x, m, d + i), gate(a, x, m, 2 * d + i), deter[i]);
    }
  }
}

// The gradient of a part from those of the three gates, which wait in grad_parts for the sums.
__global__ void backward_kernel(GruLayerNorm a, float* __restrict__ grad_gates,
                                float* __restrict__ grad_deter, float* __restrict__ moments,
                                int64_t rows) {
  const int64_t d = a.width;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float *x = a.parts + row * 3 * d, *deter = a.deter + row * d, *grad = a.grad + row * d;
    float* g = grad_gates + row * 3 * d;
    const Moments m = moments_of(x, 3 * d, a.eps);
    float sum = 0.0f, dot = 0.0f;  // of the gradient of the normed row, alone and times the row
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
      const GruGateGrad of =
          gru_gate_backward(grad[i], gate(a, x, m, i), gate(a, x, m, d + i),
                            gate(a, x, m, 2 * d + i), deter[i]);
      const float grads[3] = {of.reset, of.cand, of.update};
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const int64_t at = part * d + i;
        g[at] = grads[part];
        sum += grads[part] * a.scale[at];
        dot += grads[part] * a.scale[at] * ((x[at] - m.mean) * m.inverse);
      }
      grad_deter[row * d + i] = of.deter;
    }
    sum = block_sum(sum), dot = block_sum(dot);
    if (threadIdx.x == 0) {
      float* to = moments + row * 4;
      to[0] = m.mean, to[1] = m.inverse;
      to[2] = sum / static_cast<float>(3 * d), to[3] = dot / static_cast<float>(3 * d);
    }
  }
}

// A thread per (range of rows, column): sums of the gates' gradients for scale and shift, and what
// becomes of these gradients behind the norm, in their place.
__global__ void affine_kernel(GruLayerNorm a, float* __restrict__ grad_parts,
                              const float* __restrict__ moments, float* __restrict__ sums,
                              int64_t rows, int64_t ranges) {
  const int64_t wide = 3 * a.width, length = (rows + ranges - 1) / ranges;
  FWM_GRID_STRIDE(k, ranges * wide) {
    const int64_t i = k % wide, range = k / wide, begin = range * length;
    const int64_t end = begin + length < rows ? begin + length : rows;
    float scale = 0.0f, shift = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
      const float* m = moments + row * 4;
      const float normed = (a.parts[row * wide + i] - m[0]) * m[1], g = grad_parts[row * wide + i];
      shift += g;
      scale += g * normed;
      grad_parts[row * wide + i] = m[1] * (g * a.scale[i] - m[2] - normed * m[3]);
    }
    sums[range * 2 * wide + i] = scale;
    sums[range * 2 * wide + wide + i] = shift;
  }
}

__global__ void sum_kernel(const float* __restrict__ sums, float* __restrict__ grad_scale,
                           float* __restrict__ grad_shift, int64_t wide, int64_t ranges) {
  FWM_GRID_STRIDE(i, 2 * wide) {
    float sum = 0.0f;
    for (int64_t range = 0; range < ranges; ++range) sum += sums[range * 2 * wide + i];
    (i < wide ? grad_scale[i] : grad_shift[i - wide]) = sum;
  }
}

}  // namespace

int64_t gru_layernorm_ranges(int64_t rows) {
  const int64_t ranges = (rows + 31) / 32;
  return ranges < 1 ? 1 : ranges > kMaxRanges ? kMaxRanges : ranges;
}

cudaError_t gru_layernorm(const GruLayerNorm& a, float* out, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || a.width == 0) return cudaSuccess;
  forward_kernel<<<blocks_for(rows, 1), kThreads, 0, stream>>>(a, out, rows);
  return cudaGetLastError();
}

cudaError_t gru_layernorm_backward(const GruLayerNorm& a, const GruLayerNormGrads& to,
                                   int64_t rows, cudaStream_t stream) {
  if (a.width == 0) return cudaSuccess;
  const int64_t ranges = gru_layernorm_ranges(rows), wide = 3 * a.width;
  if (rows > 0) {
    backward_kernel<<<blocks_for(rows, 1), kThreads, 0, stream>>>(a, to.parts, to.deter, to.moments,
                                                                  rows);
  }
  affine_kernel<<<blocks_for(ranges * wide), kThreads, 0, stream>>>(a, to.parts, to.moments,
                                                                    to.sums, rows, ranges);
  sum_kernel<<<blocks_for(2 * wide), kThreads, 0, stream>>>(to.sums, to.scale, to.shift, wide,
                                                            ranges);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
