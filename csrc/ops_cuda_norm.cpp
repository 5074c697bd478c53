// CUDA bindings of the norm stem; see ops_cuda.cpp. x may be bfloat16; y and its gradients are too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/norm.h"
#include "low.h"
#include "on_device.h"

namespace fastwm {
namespace {

Tensor rms_silu_cuda(Tensor x, Tensor scale, double eps) {
  constexpr const char* op = "rms_silu";
  check_min_dim(op, "x", x, "(..., U)", 1);
  const OnDeviceOf device(x);
  const int64_t features = x.size(x.dim() - 1), rows = product(leading(x, 1));
  const Tensor input = dense(x), gain = rows_arg(op, "scale", scale, x, "(U,)", {features});
  Tensor y = allocate(x, sizes_of(x));
  with_type(op, "x", x, [&](auto type) {
    using T = decltype(type);
    const cuda::RmsSilu<T> args{data<T>(input), ptr(gain), nullptr,
                                rows,           features,  static_cast<float>(eps)};
    STD_CUDA_CHECK(cuda::rms_silu(args, mutable_data<T>(y), device.stream()));
  });
  return y;
}

std::tuple<Tensor, Tensor> rms_silu_backward_cuda(Tensor grad_y, Tensor x, Tensor scale,
                                                  double eps) {
  constexpr const char* op = "rms_silu_backward";
  check_min_dim(op, "x", x, "(..., U)", 1);
  const OnDeviceOf device(x);
  const int64_t features = x.size(x.dim() - 1), rows = product(leading(x, 1));
  const Tensor input = dense(x), gain = rows_arg(op, "scale", scale, x, "(U,)", {features});
  const Tensor grad = rows_arg(op, "grad_y", grad_y, x, "(..., U)", sizes_of(x), x.scalar_type());
  Tensor grad_x = allocate(x, sizes_of(x)), grad_scale = allocate(gain, {features});
  Tensor parts = allocate(gain, {cuda::rms_silu_ranges(rows), features});
  Tensor inverse = allocate(gain, {rows});
  with_type(op, "x", x, [&](auto type) {
    using T = decltype(type);
    const cuda::RmsSilu<T> args{data<T>(input), ptr(gain), data<T>(grad),
                                rows,           features,  static_cast<float>(eps)};
    STD_CUDA_CHECK(cuda::rms_silu_backward(args, mutable_data<T>(grad_x), mutable_ptr(grad_scale),
                                           mutable_ptr(parts), mutable_ptr(inverse),
                                           device.stream()));
  });
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("rms_silu", TORCH_BOX(&fastwm::rms_silu_cuda));
  m.impl("rms_silu_backward", TORCH_BOX(&fastwm::rms_silu_backward_cuda));
}
