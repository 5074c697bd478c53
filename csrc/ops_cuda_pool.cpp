// CUDA bindings of the pool stem; see ops_cuda.cpp. Images may be bfloat16, and all that goes with
// them; bias, scale and their gradients are float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/norm.h"
#include "cuda/pool.h"
#include "on_device.h"
#include "pool_args.h"

namespace fastwm {
namespace {

std::tuple<Tensor, Tensor, Tensor> pool_silu_cuda(Tensor x, Tensor bias, Tensor scale, double eps) {
  constexpr const char* op = "pool_silu";
  const PoolShape shape = pool_shape(op, x, bias, scale);
  const OnDeviceOf device(x);
  const Tensor input = dense(x), offset = dense(bias), gain = dense(scale);
  Tensor y = allocate(x, shape.pooled()), pooled = allocate(x, shape.pooled());
  Tensor index = allocate(x, shape.pooled(), ScalarType::Byte);
  with_type(op, "x", x, [&](auto type) {
    using T = decltype(type);
    const cuda::PoolSilu<T> args{data<T>(input), ptr(offset), ptr(gain), shape.images,
                                 shape.as<cuda::PoolSizes>(eps)};
    STD_CUDA_CHECK(cuda::pool_silu(args, mutable_data<T>(y), mutable_data<T>(pooled),
                                   mutable_ptr<uint8_t>(index), device.stream()));
  });
  return {y, pooled, index};
}

std::tuple<Tensor, Tensor, Tensor> pool_silu_backward_cuda(Tensor grad_y, Tensor pooled,
                                                           Tensor index, Tensor scale, double eps,
                                                           int64_t height, int64_t width) {
  constexpr const char* op = "pool_silu_backward";
  const PoolShape shape = pool_shape(op, grad_y, pooled, index, scale, height, width);
  const OnDeviceOf device(pooled);
  const Tensor grad = dense(grad_y), found = dense(pooled), from = dense(index);
  const Tensor gain = dense(scale);
  const auto n = shape.as<cuda::PoolSizes>(eps);
  const int64_t channels = shape.channels, pixels = shape.images * (height / 2) * (width / 2);
  Tensor grad_x = allocate(pooled, {shape.images, height, width, channels});
  Tensor grad_pooled = allocate(pooled, shape.pooled());
  Tensor grad_bias = allocate(gain, {channels}), grad_scale = allocate(gain, {channels});
  Tensor parts = allocate(gain, {cuda::rms_silu_ranges(pixels), channels});
  Tensor inverse = allocate(gain, {pixels});
  with_type(op, "pooled", pooled, [&](auto type) {
    using T = decltype(type);
    const cuda::RmsSilu<T> norm{data<T>(found), ptr(gain), data<T>(grad), pixels, channels, n.eps};
    T* between = mutable_data<T>(grad_pooled);
    STD_CUDA_CHECK(cuda::rms_silu_backward(norm, between, mutable_ptr(grad_scale),
                                           mutable_ptr(parts), mutable_ptr(inverse),
                                           device.stream()));
    STD_CUDA_CHECK(cuda::pool_spread<T>(between, ptr<uint8_t>(from), shape.images, n,
                                        mutable_data<T>(grad_x), mutable_ptr(grad_bias),
                                        mutable_ptr(parts), device.stream()));
  });
  return {grad_x, grad_bias, grad_scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("pool_silu", TORCH_BOX(&fastwm::pool_silu_cuda));
  m.impl("pool_silu_backward", TORCH_BOX(&fastwm::pool_silu_backward_cuda));
}
