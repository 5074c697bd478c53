// RMSNorm and SiLU. A few rows at a time: a sweep for the sums of squares, a second one, in cache
// by then, for the rest. The backward pass computes the norm again instead of storing it.
#ifndef FWM_ISA
#include "cpu/norm.h"
#include "cpu/norm_rows.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/norm.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void rms_silu(const RmsSilu& a, float* y, int64_t begin, int64_t end) {
  FWM_CALL(rms_silu)(a, y, begin, end);
}

void rms_silu_backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                       int64_t end) {
  FWM_CALL(rms_silu_backward)(a, grad_x, grad_scale, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

template <int kWidth>
static void forward(const RmsSilu& a, float* y, int64_t begin, int64_t end) {
  const int64_t n = kWidth ? kWidth : a.features;
  rms_silu_rows<kWidth>(a.x + begin * n, a.scale, n, a.eps, end - begin, y + begin * n);
}

template <int kWidth>
static void backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                     int64_t end) {
  const int64_t n = kWidth ? kWidth : a.features;
  for (int64_t u = 0; u < n; ++u) grad_scale[u] = 0.0f;
  rms_silu_rows_backward<kWidth>(a.x + begin * n, a.scale, a.grad_y + begin * n, n, a.eps,
                                 end - begin, grad_x + begin * n, grad_scale);
}

void rms_silu(const RmsSilu& a, float* y, int64_t begin, int64_t end) {
#define FWM_FORM(width) forward<width>(a, y, begin, end)
  FWM_FOR_WIDTH(a.features, FWM_FORM)
#undef FWM_FORM
}

void rms_silu_backward(const RmsSilu& a, float* grad_x, float* grad_scale, int64_t begin,
                       int64_t end) {
#define FWM_FORM(width) backward<width>(a, grad_x, grad_scale, begin, end)
  FWM_FOR_WIDTH(a.features, FWM_FORM)
#undef FWM_FORM
}

}  // namespace fastwm::FWM_ISA

#endif
