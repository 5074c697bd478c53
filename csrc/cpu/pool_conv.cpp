// The gradient of a convolution whose results are pooled: of every 2x2 results only the largest has
// one. The library's dense product would multiply three zeros of four. Here each pooled number adds
// its multiple of the k x k patch that it saw to the kernel's gradient, and its multiple of the
// kernel to that patch of the image's gradient. A row of a patch is contiguous, (k, C), and lies in
// SIMD lanes.
#ifndef FWM_ISA
#include "cpu/pool.h"

#include "cpu/lanes.h"
#include "cpu/norm_rows.h"
#include "cpu/simd.h"

namespace fastwm {

// The lists of two channels must not begin in the same set of the cache.
static int64_t list_stride(const PoolConv& a) { return (a.pool.n.pixels() + 15) / 16 * 16 + 16; }

}  // namespace fastwm

#define FWM_SOURCE "cpu/pool_conv.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

// Images with a border of k / 2 zeros: x as it is, its gradient with channels in whole vectors.
static int64_t padded_pixels(const PoolConv& a) {
  return (a.pool.n.height + a.kernel - 1) * (a.pool.n.width + a.kernel - 1);
}

int64_t PoolConv::scratch() const {
  const int64_t lists = (pool.n.pixels() + 2 * list_stride(*this)) * pool.n.channels;
  return lists + padded_pixels(*this) * (inputs + (weight ? lanes() : 0)) + 8 + 64;
}

// Each kernel in four places of a square that is larger by one: where a pooled number may come
// from.
void pool_conv_pack(const PoolConv& a, const float* weight, float* packed) {
  const int64_t k = a.kernel, side = k + 1, lanes = a.lanes(), channels = a.pool.n.channels;
  for (int64_t i = 0; i < a.packed(); ++i) packed[i] = 0.0f;
  for (int64_t o = 0; o < channels; ++o) {
    for (int64_t from = 0; from < 4; ++from) {
      for (int64_t tap = 0; tap < k * k; ++tap) {
        const int64_t row = tap / k + (from >> 1), column = tap % k + (from & 1);
        float* to = packed + (((row * channels + o) * 4 + from) * side + column) * lanes;
        for (int64_t c = 0; c < a.inputs; ++c) to[c] = weight[(o * a.inputs + c) * k * k + tap];
      }
    }
  }
}

void pool_conv_backward(const PoolConv& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end) {
  FWM_CALL(pool_conv_backward)(a, scratch, grad_x, sums, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {
namespace {

// The pooled numbers of one channel, as lists: their gradients, and where each patch begins.
struct Found {
  const float* grad;
  const int32_t* pixel;
  int64_t count;
};

// As references: a vector that a function returns is passed otherwise without AVX.
inline const Eight& eight(const float* x) { return *reinterpret_cast<const Eight*>(x); }
inline Eight& eight(float* x) { return *reinterpret_cast<Eight*>(x); }

// sums (kRows, stride) += sum over the list of grad * patch rows, kVectors of each; x: (…, line).
template <int kRows, int kVectors>
void add_patches(const Found& found, const float* x, int64_t inputs, int64_t line, float* sums,
                 int64_t stride) {
  Eight sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < found.count; ++p) {
    const float grad = found.grad[p];
    const float* patch = x + found.pixel[p] * inputs;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += grad * eight(patch + r * line + 8 * v);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      eight(sums + r * stride + 8 * v) += sum[r][v];
    }
  }
}

// All k rows of the kernel's gradient for one output channel, as many at once as registers hold.
template <int kVectors>
void add_kernel(const Found& found, const float* x, int64_t inputs, int64_t line, float* sums,
                int64_t stride, int64_t rows) {
  constexpr int kMost = kVectors >= 6 ? 1 : kVectors >= 4 ? 2 : kVectors == 3 ? 3 : 5;
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) {
    add_patches<kMost, kVectors>(found, x + r * line, inputs, line, sums + r * stride, stride);
  }
  for (; r < rows; ++r) {
    add_patches<1, kVectors>(found, x + r * line, inputs, line, sums + r * stride, stride);
  }
}

void add_weight_grad(const PoolConv& a, const Found& found, const float* x, float* sums) {
  const int64_t line = (a.pool.n.width + a.kernel - 1) * a.inputs, stride = a.taps();
  for (int64_t first = 0; first < stride; first += 80) {
    const int64_t vectors = (stride - first < 80 ? stride - first : 80) / 8;
    switch (vectors) {
#define FWM_VECTORS(v)                                                               \
  case v:                                                                            \
    add_kernel<v>(found, x + first, a.inputs, line, sums + first, stride, a.kernel); \
    break;
      FWM_VECTORS(1)
      FWM_VECTORS(2)
      FWM_VECTORS(3)
      FWM_VECTORS(4)
      FWM_VECTORS(5)
      FWM_VECTORS(6)
      FWM_VECTORS(7)
      FWM_VECTORS(8)
      FWM_VECTORS(9)
      FWM_VECTORS(10)
#undef FWM_VECTORS
    }
  }
}

// One line of each square, kVectors of it: sums of all channels' multiples of their kernels.
template <int kVectors>
void add_squares(const PoolConv& a, const float* grads, const uint8_t* index, const float* weight,
                 int64_t line, float* grad_x) {
  const int64_t channels = a.pool.n.channels, width = (a.kernel + 1) * a.lanes();
  for (int64_t i = 0; i < a.pool.n.rows(); ++i) {
    float* to = grad_x + 2 * i * line;
    for (int64_t j = 0; j < a.pool.n.columns(); ++j, to += 2 * a.lanes()) {
      Eight sum[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[v] = eight(to + 8 * v);
      for (int64_t o = 0; o < channels; ++o) {
        const float grad = *grads++;
        const float* kernel = weight + (4 * o + (*index++ & 3)) * width;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[v] += grad * eight(kernel + 8 * v);
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) eight(to + 8 * v) = sum[v];
    }
  }
}

// The gradient of the padded image with channels in lanes, line by line of the squares.
void add_image_grad(const PoolConv& a, const float* grads, const uint8_t* index, float* grad_x) {
  const int64_t lanes = a.lanes(), side = a.kernel + 1, width = side * lanes;
  const int64_t line = (a.pool.n.width + a.kernel - 1) * lanes;
  for (int64_t r = 0; r < side; ++r) {
    const float* weight = a.weight + r * a.pool.n.channels * 4 * width;
    int64_t first = 0;
    for (; first + 96 <= width; first += 96) {
      add_squares<12>(a, grads, index, weight + first, line, grad_x + r * line + first);
    }
    for (; first + 48 <= width; first += 48) {
      add_squares<6>(a, grads, index, weight + first, line, grad_x + r * line + first);
    }
    for (; first < width; first += 8) {
      add_squares<1>(a, grads, index, weight + first, line, grad_x + r * line + first);
    }
  }
}

// Gradients before the norm of one image, and per channel the lists of Found.
template <int kWidth>
void find(const PoolSiluGrad& a, int64_t image, int64_t line, int64_t stride, float* grads,
          float* lists, int32_t* pixels, float* __restrict__ grad_bias,
          float* __restrict__ grad_scale) {
  const int64_t n = kWidth ? kWidth : a.n.channels, count = a.n.pixels();
  const int64_t columns = a.n.columns(), at = image * count * n;
  rms_silu_rows_backward<kWidth>(a.pooled + at, a.scale, a.grad_y + at, n, a.n.eps, count, grads,
                                 grad_scale);
  for (int64_t i = 0, p = 0; i < a.n.rows(); ++i) {
    for (int64_t j = 0; j < columns; ++j, ++p) {
      const float* grad = grads + p * n;
      const uint8_t* index = a.index + at + p * n;
      const int64_t corner = 2 * i * line + 2 * j;
      for (int64_t u = 0; u < n; ++u) {
        const int64_t from = index[u] & 3;
        grad_bias[u] += grad[u];
        lists[u * stride + p] = grad[u];
        pixels[u * stride + p] = static_cast<int32_t>(corner + (from >> 1) * line + (from & 1));
      }
    }
  }
}

template <class T>
void pad(const PoolConv& a, const T* x, float* padded) {
  const int64_t border = a.kernel / 2, height = a.pool.n.height, width = a.pool.n.width;
  const int64_t line = (width + 2 * border) * a.inputs, inner = width * a.inputs;
  const int64_t total = (height + 2 * border) * line + 8;  // whole vectors may read past the end
  const int64_t side = border * a.inputs;
  for (int64_t i = 0; i < border * line; ++i) padded[i] = 0.0f;
  for (int64_t i = 0; i < height; ++i) {
    float* to = padded + (border + i) * line;
    for (int64_t j = 0; j < side; ++j) to[j] = to[side + inner + j] = 0.0f;
    for (int64_t j = 0; j < inner; ++j) to[side + j] = pixel(x[i * inner + j]);
  }
  for (int64_t i = (height + border) * line; i < total; ++i) padded[i] = 0.0f;
}

void unpad(const PoolConv& a, const float* padded, float* x) {
  const int64_t border = a.kernel / 2, width = a.pool.n.width, lanes = a.lanes();
  for (int64_t i = 0; i < a.pool.n.height; ++i) {
    const float* from = padded + ((border + i) * (width + 2 * border) + border) * lanes;
    for (int64_t j = 0; j < width; ++j) {
      float* to = x + (i * width + j) * a.inputs;
      for (int64_t c = 0; c < a.inputs; ++c) to[c] = from[j * lanes + c];
    }
  }
}

}  // namespace

void pool_conv_backward(const PoolConv& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end) {
  const PoolSizes& n = a.pool.n;
  const int64_t count = n.pixels(), line = n.width + a.kernel - 1, pixels = n.height * n.width;
  const int64_t padded = line * (n.height + a.kernel - 1), kernel = a.kernel * a.taps();
  const int64_t stride = list_stride(a);
  float *grads = scratch, *lists = grads + count * n.channels;
  int32_t* found = reinterpret_cast<int32_t*>(lists + stride * n.channels);
  float* image = lists + 2 * stride * n.channels;
  float* image_grad = image + padded * a.inputs + 8;
  image_grad += (16 - reinterpret_cast<uintptr_t>(image_grad) / 4 % 16) % 16;  // whole cache lines
  float *grad_bias = sums + a.sums(), *grad_scale = grad_bias + n.channels;
  for (int64_t i = 0; i < a.sums() + 2 * n.channels; ++i) sums[i] = 0.0f;
  for (int64_t i = begin; i < end; ++i) {
#define FWM_FORM(width) \
  find<width>(a.pool, i, line, stride, grads, lists, found, grad_bias, grad_scale)
    FWM_FOR_WIDTH(n.channels, FWM_FORM)
#undef FWM_FORM
    if (a.bytes) pad(a, a.bytes + i * pixels * a.inputs, image);
    if (a.x) pad(a, a.x + i * pixels * a.inputs, image);
    if (a.weight) {
      for (int64_t j = 0; j < padded * a.lanes(); ++j) image_grad[j] = 0.0f;
    }
    for (int64_t o = 0; o < n.channels; ++o) {
      const Found list{lists + o * stride, found + o * stride, count};
      add_weight_grad(a, list, image, sums + o * kernel);
    }
    if (a.weight) add_image_grad(a, grads, a.pool.index + i * count * n.channels, image_grad);
    if (a.weight) unpad(a, image_grad, grad_x + i * pixels * a.inputs);
  }
}

}  // namespace fastwm::FWM_ISA

#endif
