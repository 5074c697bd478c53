// 2x2 max pooling, bias, RMSNorm and SiLU: a warp per pooled pixel, lanes over its channels.
// Backward, after that of the norm: a thread per number of the image, which writes the gradient or
// zero, so that nothing is cleared before.
#include "cuda/pool.h"

#include "cuda/norm.h"
#include "cuda/warps.cuh"

namespace fastwm::cuda {
namespace {

template <class T>
__global__ void forward_kernel(PoolSilu<T> a, T* __restrict__ y, T* __restrict__ pooled,
                               uint8_t* __restrict__ index) {
  const int64_t columns = a.n.width / 2, pixels = a.n.height / 2 * columns, count = a.n.channels;
  const int64_t line = a.n.width * count;
  FWM_WARP_STRIDE(pixel, a.images * pixels) {
    const int64_t image = pixel / pixels, row = pixel % pixels / columns, column = pixel % columns;
    const T* x = a.x + (image * a.n.height + 2 * row) * line + 2 * column * count;
    const int64_t at = pixel * count;
    float squares = 0.0f;
    FWM_LANE_STRIDE(u, count) {
      // The first of equals wins, NaN wins over all, as in PyTorch.
      float most = widen(x[u]);
      int from = 0;
      for (int i = 1; i < 4; ++i) {
        const float other = widen(x[u + (i >> 1) * line + (i & 1) * count]);
        if (other > most || other != other) {
          most = other;
          from = i;
        }
      }
      narrow(most + a.bias[u], pooled[at + u]);
      index[at + u] = static_cast<uint8_t>(from);
      const float value = widen(pooled[at + u]);
      squares += value * value;
    }
    const float mean = warp_sum(squares) / static_cast<float>(count);
    const float inverse = 1.0f / sqrtf(mean + a.n.eps);
    FWM_LANE_STRIDE(u, count) {
      narrow(silu(widen(pooled[at + u]) * inverse * a.scale[u]), y[at + u]);
    }
  }
}

template <class T>
__global__ void spread_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ index,
                              PoolSizes n, int64_t numbers, T* __restrict__ grad_x) {
  const int64_t rows = n.height / 2, columns = n.width / 2;
  FWM_GRID_STRIDE(i, numbers) {
    const int64_t u = i % n.channels, column = i / n.channels % n.width;
    const int64_t row = i / (n.channels * n.width) % n.height;
    const int64_t image = i / (n.channels * n.width * n.height);
    float value = 0.0f;
    if (row / 2 < rows && column / 2 < columns) {
      const int64_t at = ((image * rows + row / 2) * columns + column / 2) * n.channels + u;
      if (index[at] == 2 * (row % 2) + column % 2) value = widen(grad[at]);
    }
    narrow(value, grad_x[i]);
  }
}

// A thread per (range of pixels, channel): sums over the pixels of the range.
template <class T>
__global__ void bias_parts_kernel(const T* __restrict__ grad, int64_t pixels, int64_t channels,
                                  int64_t ranges, float* __restrict__ parts) {
  const int64_t length = (pixels + ranges - 1) / ranges;
  FWM_GRID_STRIDE(i, ranges * channels) {
    const int64_t u = i % channels, begin = i / channels * length;
    const int64_t end = begin + length < pixels ? begin + length : pixels;
    float sum = 0.0f;
    for (int64_t pixel = begin; pixel < end; ++pixel) sum += widen(grad[pixel * channels + u]);
    parts[i] = sum;
  }
}

__global__ void bias_kernel(const float* __restrict__ parts, float* __restrict__ grad_bias,
                            int64_t channels, int64_t ranges) {
  FWM_GRID_STRIDE(u, channels) {
    float sum = 0.0f;
    for (int64_t i = 0; i < ranges; ++i) sum += parts[i * channels + u];
    grad_bias[u] = sum;
  }
}

}  // namespace

template <class T>
cudaError_t pool_silu(const PoolSilu<T>& a, T* y, T* pooled, uint8_t* index, cudaStream_t stream) {
  const int64_t pixels = a.images * (a.n.height / 2) * (a.n.width / 2);
  if (pixels == 0 || a.n.channels == 0) return cudaSuccess;
  forward_kernel<T><<<blocks_for_warps(pixels), kThreads, 0, stream>>>(a, y, pooled, index);
  return cudaGetLastError();
}

template <class T>
cudaError_t pool_spread(const T* grad, const uint8_t* index, int64_t images, const PoolSizes& n,
                        T* grad_x, float* grad_bias, float* parts, cudaStream_t stream) {
  if (n.channels == 0) return cudaSuccess;
  const int64_t numbers = images * n.height * n.width * n.channels;
  const int64_t pixels = images * (n.height / 2) * (n.width / 2), ranges = rms_silu_ranges(pixels);
  if (numbers > 0) {
    spread_kernel<T><<<blocks_for(numbers), kThreads, 0, stream>>>(grad, index, n, numbers, grad_x);
  }
  bias_parts_kernel<T><<<blocks_for(ranges * n.channels), kThreads, 0, stream>>>(
      grad, pixels, n.channels, ranges, parts);
  bias_kernel<<<blocks_for(n.channels), kThreads, 0, stream>>>(parts, grad_bias, n.channels,
                                                               ranges);
  return cudaGetLastError();
}

#define FWM_POOL(T)                                                                         \
  template cudaError_t pool_silu(const PoolSilu<T>&, T*, T*, uint8_t*, cudaStream_t);       \
  template cudaError_t pool_spread(const T*, const uint8_t*, int64_t, const PoolSizes&, T*, \
                                   float*, float*, cudaStream_t);
FWM_POOL(float)
FWM_POOL(Bf16)
#undef FWM_POOL

}  // namespace fastwm::cuda
