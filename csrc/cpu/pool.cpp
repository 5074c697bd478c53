// 2x2 max pooling, bias, RMSNorm and SiLU in one pass: a line of pooled pixels at a time, channels
// in SIMD lanes. The bias moves behind the maximum: max(x + b) = max(x) + b.
#ifndef FWM_ISA
#include "cpu/pool.h"

#include "cpu/norm_rows.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/pool.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void pool_silu(const PoolSilu& a, float* y, float* pooled, uint8_t* index, int64_t begin,
               int64_t end) {
  FWM_CALL(pool_silu)(a, y, pooled, index, begin, end);
}

void pool_silu_backward(const PoolSiluGrad& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end) {
  FWM_CALL(pool_silu_backward)(a, scratch, grad_x, sums, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

template <int kWidth>
static void forward(const PoolSilu& a, float* __restrict__ y, float* __restrict__ pooled,
                    uint8_t* __restrict__ index, int64_t begin, int64_t end) {
  const int64_t n = kWidth ? kWidth : a.n.channels, line = a.n.width * n;
  for (int64_t image = begin; image < end; ++image) {
    for (int64_t i = 0; i < a.n.rows(); ++i) {
      const float* x = a.x + (image * a.n.height + 2 * i) * line;
      const int64_t at = (image * a.n.rows() + i) * a.n.columns() * n;
      float* best = pooled + at;
      uint8_t* where = index + at;
      for (int64_t j = 0; j < a.n.columns(); ++j, x += 2 * n, best += n, where += n) {
        // The first of equals wins, NaN wins over all, as in PyTorch.
        FWM_SWEEP("omp simd", float most = x[u]; int32_t from = 0; const float one = x[n + u];
                  from = one > most || one != one ? 1 : from;
                  most = one > most || one != one ? one : most; const float two = x[line + u];
                  from = two > most || two != two ? 2 : from;
                  most = two > most || two != two ? two : most; const float three = x[line + n + u];
                  from = three > most || three != three ? 3 : from;
                  most = three > most || three != three ? three : most; best[u] = most + a.bias[u];
                  where[u] = static_cast<uint8_t>(from);)
      }
      rms_silu_rows<kWidth>(pooled + at, a.scale, n, a.n.eps, a.n.columns(), y + at);
    }
  }
}

void pool_silu(const PoolSilu& a, float* y, float* pooled, uint8_t* index, int64_t begin,
               int64_t end) {
#define FWM_FORM(width) forward<width>(a, y, pooled, index, begin, end)
  FWM_FOR_WIDTH(a.n.channels, FWM_FORM)
#undef FWM_FORM
}

template <int kWidth>
static void backward(const PoolSiluGrad& a, float* line_grad, float* __restrict__ grad_x,
                     float* __restrict__ grad_bias, float* __restrict__ grad_scale, int64_t begin,
                     int64_t end) {
  const int64_t n = kWidth ? kWidth : a.n.channels, line = a.n.width * n;
  const int64_t rows = a.n.rows(), columns = a.n.columns();
  for (int64_t u = 0; u < n; ++u) grad_bias[u] = grad_scale[u] = 0.0f;
  for (int64_t image = begin; image < end; ++image) {
    float* out = grad_x + image * a.n.height * line;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (image * rows + i) * columns * n;
      rms_silu_rows_backward<kWidth>(a.pooled + at, a.scale, a.grad_y + at, n, a.n.eps, columns,
                                     line_grad, grad_scale);
      float* x = out + 2 * i * line;
      const float* grad = line_grad;
      const uint8_t* where = a.index + at;
      for (int64_t j = 0; j < columns; ++j, x += 2 * n, grad += n, where += n) {
        FWM_SWEEP("omp simd", const int32_t from = where[u]; grad_bias[u] += grad[u];
                  x[u] = from == 0 ? grad[u] : 0.0f; x[n + u] = from == 1 ? grad[u] : 0.0f;
                  x[line + u] = from == 2 ? grad[u] : 0.0f;
                  x[line + n + u] = from == 3 ? grad[u] : 0.0f;)
      }
      for (int64_t u = 2 * columns * n; u < line; ++u) {  // a last column without a pair
        out[2 * i * line + u] = out[(2 * i + 1) * line + u] = 0.0f;
      }
    }
    for (int64_t u = 2 * rows * line; u < a.n.height * line; ++u) out[u] = 0.0f;
  }
}

void pool_silu_backward(const PoolSiluGrad& a, float* scratch, float* grad_x, float* sums,
                        int64_t begin, int64_t end) {
  float* scales = sums + a.n.channels;
#define FWM_FORM(width) backward<width>(a, scratch, grad_x, sums, scales, begin, end)
  FWM_FOR_WIDTH(a.n.channels, FWM_FORM)
#undef FWM_FORM
}

}  // namespace fastwm::FWM_ISA

#endif
