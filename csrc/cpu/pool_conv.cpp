// The gradient of a convolution whose results are pooled: of every 2x2 results only the largest has
// one. The library's dense product would multiply three zeros of four. Here each pooled number adds
// its multiple of the k x k patch that it saw to the kernel's gradient, and its multiple of the
// kernel to that patch of the image's gradient. A row of a patch is contiguous, (k, C), and lies in
// SIMD lanes.
#ifndef FWM_ISA
#include "cpu/pool.h"

#include "cpu/lanes.h"
#include "cpu/simd.h"

namespace fastwm {

constexpr int64_t kBlock = 16;   // pixels whose gradients are found together
constexpr int64_t kBand = 4096;  // numbers of an image that the lists of all channels pass over

static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The lists of two channels must not begin in the same set of the cache.
static int64_t list_stride(const PoolConv& a) { return round_up(a.pool.n.pixels(), kBlock) + 16; }

}  // namespace fastwm

#define FWM_SOURCE "cpu/pool_conv.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

// Images with a border of k / 2 zeros: x as it is, its gradient with channels in whole vectors.
static int64_t padded_pixels(const PoolConv& a) {
  return (a.pool.n.height + a.kernel - 1) * (a.pool.n.width + a.kernel - 1);
}

int64_t PoolConv::scratch() const {
  const int64_t lists = list_stride(*this) * (2 * pool.n.channels + 1);
  const int64_t found = 5 * kBlock * round_up(pool.n.channels, 8);
  return lists + found + padded_pixels(*this) * (inputs + (weight ? lanes() : 0)) + 4 * 16 + 64;
}

// Each kernel in four places of a square that is larger by one: where a pooled number may come
// from.
void pool_conv_pack(const PoolConv& a, const float* weight, float* packed) {
  const int64_t k = a.kernel, lanes = a.lanes(), channels = a.pool.n.channels;
  for (int64_t i = 0; i < a.packed(); ++i) packed[i] = 0.0f;
  for (int64_t o = 0; o < channels; ++o) {
    for (int64_t from = 0; from < 4; ++from) {
      for (int64_t tap = 0; tap < k * k; ++tap) {
        const int64_t row = tap / k + (from >> 1), column = tap % k + (from & 1);
        float* to = packed + ((row * channels + o) * 4 + from) * a.width() + column * lanes;
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

#include "cpu/vec.h"

// Not inlined: a loop that shares its registers with others reads them from the stack each time.
#undef FWM_ALONE
#define FWM_ALONE __attribute__((noinline))

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

// The pointer in a register: what is added to it later becomes part of loads, not of sums.
FWM_INLINE const float* held(const float* x) {
#if defined(__GNUC__)
  __asm__("" : "+r"(x));
#endif
  return x;
}

// sums (kRows, stride) += sum over the list of grad * patch rows, kVectors of each; x: (…, line).
template <int kRows, int kVectors>
FWM_ALONE void add_patches(const Found& found, const float* x, int64_t inputs, int64_t line,
                           float* sums, int64_t stride) {
  Eight sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < found.count; ++p) {
    const float grad = found.grad[p];
    const float* patch = x + found.pixel[p] * inputs;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, patch += line) {
      patch = held(patch);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += grad * eight(patch + 8 * v);
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
  constexpr int kMost = kVectors >= 6 ? 1 : kVectors >= 4 ? 3 : 5;
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) {
    add_patches<kMost, kVectors>(found, x + r * line, inputs, line, sums + r * stride, stride);
  }
  if (kMost == 3 && r + 2 <= rows) {
    add_patches<2, kVectors>(found, x + r * line, inputs, line, sums + r * stride, stride);
    r += 2;
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

// All channels, a band of the image at a time: it stays in L1.
void add_weight_grads(const PoolConv& a, const float* grads, const int32_t* pixels, const float* x,
                      float* sums) {
  const int64_t rows = a.pool.n.rows(), columns = a.pool.n.columns(), stride = list_stride(a);
  const int64_t line = (a.pool.n.width + a.kernel - 1) * a.inputs;
  if (columns == 0) return;
  const int64_t fit = kBand / (2 * line + 1), least = (64 + columns - 1) / columns;
  const int64_t band = fit < least ? least : fit;
  for (int64_t first = 0; first < rows; first += band) {
    const int64_t at = first * columns;
    const int64_t count = (rows - first < band ? rows - first : band) * columns;
    for (int64_t o = 0; o < a.pool.n.channels; ++o) {
      const Found list{grads + o * stride + at, pixels + o * stride + at, count};
      add_weight_grad(a, list, x, sums + o * a.kernel * a.taps());
    }
  }
}

// One line of each square, kVectors of it: sums of all channels' multiples of their kernels.
template <int kVectors>
FWM_ALONE void add_squares(const PoolConv& a, const float* grads, const uint8_t* index,
                           const float* weight, int64_t line, float* grad_x) {
  const int64_t channels = a.pool.n.channels, width = a.width(), stride = list_stride(a);
  for (int64_t i = 0; i < a.pool.n.rows(); ++i) {
    float* to = grad_x + 2 * i * line;
    for (int64_t j = 0; j < a.pool.n.columns(); ++j, to += 2 * a.lanes(), ++grads) {
      Eight sum[kVectors] = {};
      const float *kernel = weight, *grad = grads;
      for (int64_t o = 0; o < channels; ++o, kernel += 4 * width, grad += stride) {
        const float* one = held(kernel + (*index++ & 3) * width);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[v] += *grad * eight(one + 8 * v);
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) eight(to + 8 * v) += sum[v];
    }
  }
}

// The gradient of the padded image with channels in lanes, line by line of the squares.
void add_image_grad(const PoolConv& a, const float* grads, const uint8_t* index, float* grad_x) {
  const int64_t width = a.width(), line = (a.pool.n.width + a.kernel - 1) * a.lanes();
  for (int64_t r = 0; r <= a.kernel; ++r) {
    const float* weight = a.weight + r * a.pool.n.channels * 4 * width;
    float* to = grad_x + r * line;
    int64_t at = 0;
    for (; at + 96 <= width; at += 96) {
      add_squares<12>(a, grads, index, weight + at, line, to + at);
    }
    for (; at + 72 <= width; at += 72) {
      add_squares<9>(a, grads, index, weight + at, line, to + at);
    }
    for (; at + 48 <= width; at += 48) {
      add_squares<6>(a, grads, index, weight + at, line, to + at);
    }
    for (; at + 24 <= width; at += 24) {
      add_squares<3>(a, grads, index, weight + at, line, to + at);
    }
    for (; at < width; at += 8) {
      add_squares<1>(a, grads, index, weight + at, line, to + at);
    }
  }
}

// Rows (count, n) of at most kBlock pixels -> (n, kBlock), zeros behind the last.
FWM_INLINE void turn_block(const float* x, int64_t n, int64_t count, float* to) {
  if (n < 8 || count < kBlock) {
    for (int64_t u = 0; u < n; ++u) {
      for (int64_t i = 0; i < kBlock; ++i) to[u * kBlock + i] = i < count ? x[i * n + u] : 0.0f;
    }
    return;
  }
  for (int64_t first = 0; first < n; first += 8) {
    const int64_t u = first + 8 > n ? n - 8 : first;  // the last channels again
    for (int64_t half = 0; half < kBlock; half += 8) {
      const float* source[8];
      float* out[8];
      for (int64_t i = 0; i < 8; ++i) {
        source[i] = x + (half + i) * n + u;
        out[i] = to + (u + i) * kBlock + half;
      }
      turn8x8(source, out);
    }
  }
}

// The same of bytes that are 0 to 3, as integers.
FWM_INLINE void turn_block(const uint8_t* x, int64_t n, int64_t count, int32_t* to) {
  if (n < 8 || count < kBlock) {
    for (int64_t u = 0; u < n; ++u) {
      for (int64_t i = 0; i < kBlock; ++i) to[u * kBlock + i] = i < count ? x[i * n + u] & 3 : 0;
    }
    return;
  }
  for (int64_t first = 0; first < n; first += 8) {
    const int64_t u = first + 8 > n ? n - 8 : first;
    for (int64_t half = 0; half < kBlock; half += 8) {
      int32_t wide[8][8];
      const float* source[8];
      float* out[8];
      for (int64_t i = 0; i < 8; ++i) {
#pragma omp simd
        for (int64_t c = 0; c < 8; ++c) wide[i][c] = x[(half + i) * n + u + c] & 3;
        source[i] = reinterpret_cast<const float*>(wide[i]);
        out[i] = reinterpret_cast<float*>(to + (u + i) * kBlock + half);
      }
      turn8x8(source, out);
    }
  }
}

// One worker's memory.
struct Desk {
  float* lists;            // (C', stride): gradients before the norm
  int32_t* pixels;         // (C', stride): where each patch begins
  int32_t* corners;        // (stride): where each square begins
  float *seen, *grads;     // (C', kBlock): of one block
  float *scales, *biases;  // (C', kBlock): sums of the gradients of scale and bias
  int32_t* index;
  float *image, *image_grad;  // with borders

  Desk(const PoolConv& a, float* next) {
    const int64_t stride = list_stride(a), channels = a.pool.n.channels;
    const auto take = [&](int64_t count) {
      float* piece = next;
      next += count;
      return piece;
    };
    next += (16 - reinterpret_cast<uintptr_t>(next) / 4 % 16) % 16;  // whole cache lines
    lists = take(stride * channels);
    pixels = reinterpret_cast<int32_t*>(take(stride * channels));
    corners = reinterpret_cast<int32_t*>(take(stride));
    const int64_t block = kBlock * round_up(channels, 8);
    seen = take(block), grads = take(block), scales = take(block), biases = take(block);
    index = reinterpret_cast<int32_t*>(take(block));
    const int64_t pixels_ = (a.pool.n.height + a.kernel - 1) * (a.pool.n.width + a.kernel - 1);
    image_grad = take(a.weight ? round_up(pixels_ * a.lanes() + 8, 16) : 0);
    image = take(pixels_ * a.inputs + 8);
  }
};

// The gradients before the norm of kBlock pixels, from desk.seen and desk.grads, as lists from
// `at` on.
FWM_INLINE void find_block(const PoolConv& a, const Desk& desk, int64_t at) {
  const int64_t n = a.pool.n.channels, stride = list_stride(a);
  const int32_t line = static_cast<int32_t>(a.pool.n.width + a.kernel - 1);
  const int32_t* corner = desk.corners + at;
  float inverse[kBlock] = {}, pull[kBlock] = {};
  for (int64_t u = 0; u < n; ++u) {
    const float* x = desk.seen + u * kBlock;
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) inverse[i] += x[i] * x[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    const float mean = inverse[i] / static_cast<float>(n) + a.pool.n.eps;
    inverse[i] = mean == 0.0f ? 0.0f : 1.0f / sqrtf(mean);  // lanes behind the last pixel, eps 0
  }
  for (int64_t u = 0; u < n; ++u) {
    const float *x = desk.seen + u * kBlock, scale = a.pool.scale[u];
    float *grad = desk.grads + u * kBlock, *scales = desk.scales + u * kBlock;
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const float normed = x[i] * inverse[i];
      const float grad_scaled = grad[i] * silu_grad(normed * scale);
      scales[i] += grad_scaled * normed;
      grad[i] = grad_scaled * scale;
      pull[i] += grad[i] * normed;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) pull[i] *= inverse[i] / static_cast<float>(n);
  for (int64_t u = 0; u < n; ++u) {
    const float *x = desk.seen + u * kBlock, *grad = desk.grads + u * kBlock;
    const int32_t* from = desk.index + u * kBlock;
    float* to = desk.lists + u * stride + at;
    int32_t* pixels = desk.pixels + u * stride + at;
    float* biases = desk.biases + u * kBlock;
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      to[i] = inverse[i] * (grad[i] - pull[i] * x[i]);
      biases[i] += to[i];
      pixels[i] = corner[i] + (from[i] >> 1) * line + (from[i] & 1);
    }
  }
}

// The lists of one image.
void find(const PoolConv& a, const Desk& desk, int64_t image) {
  const int64_t n = a.pool.n.channels, count = a.pool.n.pixels();
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t some = count - at < kBlock ? count - at : kBlock;
    const int64_t first = (image * count + at) * n;
    turn_block(a.pool.pooled + first, n, some, desk.seen);
    turn_block(a.pool.grad_y + first, n, some, desk.grads);
    turn_block(a.pool.index + first, n, some, desk.index);
    find_block(a, desk, at);
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
    float* to = x + i * width * a.inputs;
    if (lanes == a.inputs) {
      for (int64_t j = 0; j < width * lanes; ++j) to[j] = from[j];
      continue;
    }
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < a.inputs; ++c) to[j * a.inputs + c] = from[j * lanes + c];
    }
  }
}

}  // namespace

void pool_conv_backward(const PoolConv& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end) {
  const PoolSizes& n = a.pool.n;
  const Desk desk(a, scratch);
  const int64_t line = n.width + a.kernel - 1, numbers = n.height * n.width * a.inputs;
  const int64_t padded = line * (n.height + a.kernel - 1) * a.lanes() + 8;
  float *grad_bias = sums + a.sums(), *grad_scale = grad_bias + n.channels;
  for (int64_t i = 0; i < a.sums() + 2 * n.channels; ++i) sums[i] = 0.0f;
  for (int64_t i = 0; i < n.channels * kBlock; ++i) desk.scales[i] = desk.biases[i] = 0.0f;
  for (int64_t p = 0; p < round_up(n.pixels(), kBlock); ++p) {
    desk.corners[p] = static_cast<int32_t>(2 * (p / n.columns() * line + p % n.columns()));
  }
  for (int64_t i = begin; i < end; ++i) {
    find(a, desk, i);
    if (a.bytes) pad(a, a.bytes + i * numbers, desk.image);
    if (a.x) pad(a, a.x + i * numbers, desk.image);
    add_weight_grads(a, desk.lists, desk.pixels, desk.image, sums);
    if (!a.weight) continue;
    for (int64_t j = 0; j < padded; ++j) desk.image_grad[j] = 0.0f;
    add_image_grad(a, desk.lists, a.pool.index + i * n.pixels() * n.channels, desk.image_grad);
    unpad(a, desk.image_grad, grad_x + i * numbers);
  }
  for (int64_t u = 0; u < n.channels; ++u) {
    for (int64_t i = 0; i < kBlock; ++i) {
      grad_bias[u] += desk.biases[u * kBlock + i];
      grad_scale[u] += desk.scales[u * kBlock + i];
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
