// CUDA implementations of the operators in ops.cpp: check, allocate, take torch's current stream,
// launch. The only CUDA code that sees torch; it needs the CUDA runtime headers but no nvcc.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/kernels.h"
#include "on_device.h"
#include "tensor.h"

namespace fastwm {
namespace {

// ---- lambda_return

Tensor lambda_return_cuda(Tensor reward, Tensor value, Tensor discount, Tensor trace) {
  constexpr const char* op = "lambda_return";
  check_shape(op, "value", value, "(B, T)", {-1, -1});
  const int64_t batch = value.size(0), length = value.size(1);
  STD_TORCH_CHECK(length >= 1, op, ": expected T >= 1, got 0");
  const OnDeviceOf device(value);
  const Tensor v = float_arg(op, "value", value, value, "(B, T)", {batch, length});
  const Tensor r = float_arg(op, "reward", reward, value, "(B, T)", {batch, length});
  const Tensor d = float_arg(op, "discount", discount, value, "(B, T)", {batch, length});
  const Tensor l = float_arg(op, "trace", trace, value, "(B, T)", {batch, length});

  Tensor returns = allocate(value, {batch, length - 1});
  if (batch == 0) return returns;
  const LambdaReturn args{ptr(r), ptr(v), ptr(d), ptr(l), nullptr, nullptr, length};
  STD_CUDA_CHECK(cuda::lambda_return(args, mutable_ptr(returns), batch, device.stream()));
  return returns;
}

std::tuple<Tensor, Tensor, Tensor> lambda_return_backward_cuda(Tensor grad_returns, Tensor returns,
                                                               Tensor value, Tensor discount,
                                                               Tensor trace) {
  constexpr const char* op = "lambda_return_backward";
  check_shape(op, "value", value, "(B, T)", {-1, -1});
  const int64_t batch = value.size(0), length = value.size(1);
  STD_TORCH_CHECK(length >= 1, op, ": expected T >= 1, got 0");
  const OnDeviceOf device(value);
  const Tensor v = float_arg(op, "value", value, value, "(B, T)", {batch, length});
  const Tensor d = float_arg(op, "discount", discount, value, "(B, T)", {batch, length});
  const Tensor l = float_arg(op, "trace", trace, value, "(B, T)", {batch, length});
  const Tensor ret = float_arg(op, "returns", returns, value, "(B, T-1)", {batch, length - 1});
  const Tensor grad =
      float_arg(op, "grad_returns", grad_returns, value, "(B, T-1)", {batch, length - 1});

  Tensor grad_reward = allocate(value, {batch, length});
  Tensor grad_value = allocate(value, {batch, length});
  Tensor grad_discount = allocate(value, {batch, length});
  if (batch > 0) {
    const LambdaReturn args{nullptr, ptr(v), ptr(d), ptr(l), ptr(ret), ptr(grad), length};
    STD_CUDA_CHECK(cuda::lambda_return_backward(args, mutable_ptr(grad_reward),
                                                mutable_ptr(grad_value), mutable_ptr(grad_discount),
                                                batch, device.stream()));
  }
  return {grad_reward, grad_value, grad_discount};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("lambda_return", TORCH_BOX(&fastwm::lambda_return_cuda));
  m.impl("lambda_return_backward", TORCH_BOX(&fastwm::lambda_return_backward_cuda));
}
