// CPU implementations of the operators in ops.cpp: check, allocate, split over threads, call the
// kernel. Together with its siblings ops_cpu_*.cpp the only CPU code that sees torch; each sibling
// has its own STABLE_TORCH_LIBRARY_IMPL block.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "tensor.h"

namespace fastwm {
namespace {

std::string cpu_capability_name() { return cpu_capability(); }

// ---- lambda_return

Tensor lambda_return_cpu(Tensor reward, Tensor value, Tensor discount, Tensor trace) {
  constexpr const char* op = "lambda_return";
  check_shape(op, "value", value, "(B, T)", {-1, -1});
  const int64_t batch = value.size(0), length = value.size(1);
  STD_TORCH_CHECK(length >= 1, op, ": expected T >= 1, got 0");
  const Tensor v = float_arg(op, "value", value, value, "(B, T)", {batch, length});
  const Tensor r = float_arg(op, "reward", reward, value, "(B, T)", {batch, length});
  const Tensor d = float_arg(op, "discount", discount, value, "(B, T)", {batch, length});
  const Tensor l = float_arg(op, "trace", trace, value, "(B, T)", {batch, length});

  Tensor returns = allocate(value, {batch, length - 1});
  const LambdaReturn args{ptr(r), ptr(v), ptr(d), ptr(l), nullptr, nullptr, length};
  float* out = mutable_ptr(returns);
  parallel(batch, length, [&](int64_t begin, int64_t end) { lambda_return(args, out, begin, end); });
  return returns;
}

std::tuple<Tensor, Tensor, Tensor> lambda_return_backward_cpu(Tensor grad_returns, Tensor returns,
                                                              Tensor value, Tensor discount,
                                                              Tensor trace) {
  constexpr const char* op = "lambda_return_backward";
  check_shape(op, "value", value, "(B, T)", {-1, -1});
  const int64_t batch = value.size(0), length = value.size(1);
  STD_TORCH_CHECK(length >= 1, op, ": expected T >= 1, got 0");
  const Tensor v = float_arg(op, "value", value, value, "(B, T)", {batch, length});
  const Tensor d = float_arg(op, "discount", discount, value, "(B, T)", {batch, length});
  const Tensor l = float_arg(op, "trace", trace, value, "(B, T)", {batch, length});
  const Tensor ret = float_arg(op, "returns", returns, value, "(B, T-1)", {batch, length - 1});
  const Tensor grad =
      float_arg(op, "grad_returns", grad_returns, value, "(B, T-1)", {batch, length - 1});

  Tensor grad_reward = allocate(value, {batch, length});
  Tensor grad_value = allocate(value, {batch, length});
  Tensor grad_discount = allocate(value, {batch, length});
  const LambdaReturn args{nullptr, ptr(v), ptr(d), ptr(l), ptr(ret), ptr(grad), length};
  float *out_r = mutable_ptr(grad_reward), *out_v = mutable_ptr(grad_value),
        *out_d = mutable_ptr(grad_discount);
  parallel(batch, length, [&](int64_t begin, int64_t end) {
    lambda_return_backward(args, out_r, out_v, out_d, begin, end);
  });
  return {grad_reward, grad_value, grad_discount};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastwm::cpu_capability_name));
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("lambda_return", TORCH_BOX(&fastwm::lambda_return_cpu));
  m.impl("lambda_return_backward", TORCH_BOX(&fastwm::lambda_return_backward_cpu));
}
