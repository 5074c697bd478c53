// CUDA bindings of the two-hot stem; see ops_cuda.cpp. Logits may be bfloat16; their gradient is
// too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>

#include "cuda/twohot.h"
#include "low.h"
#include "on_device.h"

namespace fastwm {
namespace {

int64_t check_logits(const char* op, const Tensor& logits) {
  check_min_dim(op, "logits", logits, "(..., V)", 1);
  const int64_t count = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(count >= 1, op, ": expected V >= 1, got V = ", count);
  return count;
}

// Keeps the row-major copies alive for as long as the kernel's pointers are used.
struct LossArgs {
  Tensor logits, bins, target, second;
  std::vector<int64_t> rows;
  float weight[2];

  LossArgs(const char* op, const Tensor& x, const Tensor& b, const Tensor& first,
           const std::optional<Tensor>& other, double w, double w2)
      : logits(x),
        bins(b),
        target(first),
        second(first),
        rows(),
        weight{static_cast<float>(w), static_cast<float>(w2)} {
    const int64_t count = check_logits(op, x);
    rows = leading(x, 1);
    logits = dense(x);
    bins = rows_arg(op, "bins", b, x, "(V,)", {count});
    target = rows_arg(op, "target", first, x, "(...)", rows);
    if (other) second = rows_arg(op, "second", *other, x, "(...)", rows);
  }
  template <class T>
  cuda::TwohotLoss<T> kernel_args(bool two) const {
    return {data<T>(logits),
            ptr(bins),
            {ptr(target), two ? ptr(second) : nullptr},
            {weight[0], weight[1]},
            nullptr,
            nullptr,
            logits.size(logits.dim() - 1)};
  }
};

std::tuple<Tensor, Tensor> twohot_loss_cuda(Tensor logits, Tensor bins, Tensor target,
                                            std::optional<Tensor> second, double weight,
                                            double second_weight) {
  constexpr const char* op = "twohot_loss";
  const OnDeviceOf device(logits);
  const LossArgs a(op, logits, bins, target, second, weight, second_weight);
  Tensor loss = allocate(logits, a.rows, ScalarType::Float);
  Tensor exp_sum = allocate(logits, a.rows, ScalarType::Float);
  with_type(op, "logits", logits, [&](auto type) {
    const auto args = a.kernel_args<decltype(type)>(second.has_value());
    STD_CUDA_CHECK(cuda::twohot_loss(args, mutable_ptr(loss), mutable_ptr(exp_sum), product(a.rows),
                                     device.stream()));
  });
  return {loss, exp_sum};
}

Tensor twohot_loss_backward_cuda(Tensor grad_loss, Tensor exp_sum, Tensor logits, Tensor bins,
                                 Tensor target, std::optional<Tensor> second, double weight,
                                 double second_weight) {
  constexpr const char* op = "twohot_loss_backward";
  const OnDeviceOf device(logits);
  const LossArgs a(op, logits, bins, target, second, weight, second_weight);
  const Tensor grad = rows_arg(op, "grad_loss", grad_loss, logits, "(...)", a.rows);
  const Tensor sums = rows_arg(op, "exp_sum", exp_sum, logits, "(...)", a.rows);
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  with_type(op, "logits", logits, [&](auto type) {
    using T = decltype(type);
    auto args = a.kernel_args<T>(second.has_value());
    args.grad_loss = ptr(grad);
    args.exp_sum = ptr(sums);
    STD_CUDA_CHECK(cuda::twohot_loss_backward(args, mutable_data<T>(grad_logits), product(a.rows),
                                              device.stream()));
  });
  return grad_logits;
}

Tensor twohot_mean_cuda(Tensor logits, Tensor bins) {
  constexpr const char* op = "twohot_mean";
  const OnDeviceOf device(logits);
  const int64_t count = check_logits(op, logits);
  const auto rows = leading(logits, 1);
  const Tensor x = dense(logits), b = rows_arg(op, "bins", bins, logits, "(V,)", {count});
  Tensor mean = allocate(logits, rows, ScalarType::Float);
  with_type(op, "logits", logits, [&](auto type) {
    using T = decltype(type);
    const cuda::TwohotMean<T> args{data<T>(x), ptr(b), nullptr, count};
    STD_CUDA_CHECK(cuda::twohot_mean(args, mutable_ptr(mean), product(rows), device.stream()));
  });
  return mean;
}

Tensor twohot_mean_backward_cuda(Tensor grad_mean, Tensor logits, Tensor bins) {
  constexpr const char* op = "twohot_mean_backward";
  const OnDeviceOf device(logits);
  const int64_t count = check_logits(op, logits);
  const auto rows = leading(logits, 1);
  const Tensor x = dense(logits), b = rows_arg(op, "bins", bins, logits, "(V,)", {count});
  const Tensor grad = rows_arg(op, "grad_mean", grad_mean, logits, "(...)", rows);
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  with_type(op, "logits", logits, [&](auto type) {
    using T = decltype(type);
    const cuda::TwohotMean<T> args{data<T>(x), ptr(b), ptr(grad), count};
    STD_CUDA_CHECK(cuda::twohot_mean_backward(args, mutable_data<T>(grad_logits), product(rows),
                                              device.stream()));
  });
  return grad_logits;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("twohot_loss", TORCH_BOX(&fastwm::twohot_loss_cuda));
  m.impl("twohot_loss_backward", TORCH_BOX(&fastwm::twohot_loss_backward_cuda));
  m.impl("twohot_mean", TORCH_BOX(&fastwm::twohot_mean_cuda));
  m.impl("twohot_mean_backward", TORCH_BOX(&fastwm::twohot_mean_backward_cuda));
}
