// RMSNorm and SiLU: a warp per row up to kWarpFeatures, a block per row beyond. The gradient of the
// scale is a sum over rows: ranges of rows in parallel, then the ranges in order, so that two runs
// are equal bit by bit.
#include "cuda/norm.h"

#include "cuda/rows.cuh"
#include "cuda/warps.cuh"

namespace fastwm::cuda {
namespace {

constexpr int64_t kWarpFeatures = 1024;
constexpr int64_t kMaxRanges = 128;

// The threads of a row: all of a warp or all of a block.
template <bool kBlock>
struct Team {
  __device__ static int64_t index() { return kBlock ? threadIdx.x : threadIdx.x % kWarpThreads; }
  __device__ static int64_t size() { return kBlock ? blockDim.x : kWarpThreads; }
  __device__ static int64_t first() {
    return kBlock ? blockIdx.x
                  : (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads;
  }
  __device__ static int64_t count() {
    return kBlock ? gridDim.x : static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpThreads;
  }
  __device__ static float sum(float x) {
    if constexpr (kBlock) {
      return block_sum(x);
    } else {
      return warp_sum(x);
    }
  }
};

template <bool kBlock, class T>
__device__ float row_inverse(const T* x, int64_t features, float eps) {
  using Row = Team<kBlock>;
  float squares = 0.0f;
  for (int64_t u = Row::index(); u < features; u += Row::size())
    squares += widen(x[u]) * widen(x[u]);
  return 1.0f / sqrtf(Row::sum(squares) / static_cast<float>(features) + eps);
}

template <bool kBlock, class T>
__global__ void forward_kernel(RmsSilu<T> a, T* __restrict__ y) {
  using Row = Team<kBlock>;
  for (int64_t row = Row::first(); row < a.rows; row += Row::count()) {
    const T* x = a.x + row * a.features;
    const float inverse = row_inverse<kBlock>(x, a.features, a.eps);
    for (int64_t u = Row::index(); u < a.features; u += Row::size()) {
      narrow(silu(widen(x[u]) * inverse * a.scale[u]), y[row * a.features + u]);
    }
  }
}

template <bool kBlock, class T>
__global__ void backward_kernel(RmsSilu<T> a, T* __restrict__ grad_x,
                                float* __restrict__ inverses) {
  using Row = Team<kBlock>;
  for (int64_t row = Row::first(); row < a.rows; row += Row::count()) {
    const T *x = a.x + row * a.features, *grad = a.grad_y + row * a.features;
    const float inverse = row_inverse<kBlock>(x, a.features, a.eps);
    float dot = 0.0f;  // <gradient of the normed row, normed row>
    for (int64_t u = Row::index(); u < a.features; u += Row::size()) {
      const float normed = widen(x[u]) * inverse, scale = a.scale[u];
      dot += widen(grad[u]) * silu_grad(normed * scale) * scale * normed;
    }
    const float pull = inverse * Row::sum(dot) / static_cast<float>(a.features);
    for (int64_t u = Row::index(); u < a.features; u += Row::size()) {
      const float value = widen(x[u]), scale = a.scale[u];
      const float grad_normed = widen(grad[u]) * silu_grad(value * inverse * scale) * scale;
      narrow(inverse * (grad_normed - pull * value), grad_x[row * a.features + u]);
    }
    if (Row::index() == 0) inverses[row] = inverse;
  }
}

// A thread per (range of rows, feature): sums over the rows of the range.
template <class T>
__global__ void scale_parts_kernel(RmsSilu<T> a, const float* __restrict__ inverses,
                                   float* __restrict__ parts, int64_t ranges) {
  const int64_t length = (a.rows + ranges - 1) / ranges;
  FWM_GRID_STRIDE(i, ranges * a.features) {
    const int64_t u = i % a.features, begin = i / a.features * length;
    const int64_t end = begin + length < a.rows ? begin + length : a.rows;
    float sum = 0.0f;
    for (int64_t row = begin; row < end; ++row) {
      const float normed = widen(a.x[row * a.features + u]) * inverses[row];
      sum += widen(a.grad_y[row * a.features + u]) * silu_grad(normed * a.scale[u]) * normed;
    }
    parts[i] = sum;
  }
}

__global__ void scale_kernel(const float* __restrict__ parts, float* __restrict__ grad_scale,
                             int64_t features, int64_t ranges) {
  FWM_GRID_STRIDE(u, features) {
    float sum = 0.0f;
    for (int64_t i = 0; i < ranges; ++i) sum += parts[i * features + u];
    grad_scale[u] = sum;
  }
}

}  // namespace

int64_t rms_silu_ranges(int64_t rows) {
  const int64_t ranges = (rows + 31) / 32;
  return ranges < 1 ? 1 : ranges > kMaxRanges ? kMaxRanges : ranges;
}

template <class T>
cudaError_t rms_silu(const RmsSilu<T>& a, T* y, cudaStream_t stream) {
  if (a.rows == 0 || a.features == 0) return cudaSuccess;
  if (a.features <= kWarpFeatures) {
    forward_kernel<false, T><<<blocks_for_warps(a.rows), kThreads, 0, stream>>>(a, y);
  } else {
    forward_kernel<true, T><<<blocks_for(a.rows, 1), kThreads, 0, stream>>>(a, y);
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t rms_silu_backward(const RmsSilu<T>& a, T* grad_x, float* grad_scale, float* parts,
                              float* inverse, cudaStream_t stream) {
  if (a.features == 0) return cudaSuccess;
  const int64_t ranges = rms_silu_ranges(a.rows);
  if (a.rows > 0 && a.features <= kWarpFeatures) {
    backward_kernel<false, T>
        <<<blocks_for_warps(a.rows), kThreads, 0, stream>>>(a, grad_x, inverse);
  } else if (a.rows > 0) {
    backward_kernel<true, T><<<blocks_for(a.rows, 1), kThreads, 0, stream>>>(a, grad_x, inverse);
  }
  scale_parts_kernel<T>
      <<<blocks_for(ranges * a.features), kThreads, 0, stream>>>(a, inverse, parts, ranges);
  scale_kernel<<<blocks_for(a.features), kThreads, 0, stream>>>(parts, grad_scale, a.features,
                                                                ranges);
  return cudaGetLastError();
}

#define FWM_NORM(T)                                                                     \
  template cudaError_t rms_silu(const RmsSilu<T>&, T*, cudaStream_t);                   \
  template cudaError_t rms_silu_backward(const RmsSilu<T>&, T*, float*, float*, float*, \
                                         cudaStream_t);
FWM_NORM(float)
FWM_NORM(Bf16)
#undef FWM_NORM

}  // namespace fastwm::cuda
