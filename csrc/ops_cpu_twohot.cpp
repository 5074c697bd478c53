// CPU bindings of the two-hot stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/twohot.h"
#include "rows.h"

namespace fastwm {
namespace {

constexpr int64_t kMaxBins = 1024;  // the kernels keep a row on the stack

int64_t check_logits(const char* op, const Tensor& logits) {
  check_min_dim(op, "logits", logits, "(..., V)", 1);
  const int64_t count = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(1 <= count && count <= kMaxBins, op, ": expected 1 <= V <= ", kMaxBins,
                  ", got V = ", count);
  return count;
}

// Keeps the row-major copies alive for as long as the kernel's pointers are used.
struct LossArgs {
  Tensor logits, bins, target, second;
  TwohotLoss args;
};

LossArgs loss_args(const char* op, const Tensor& logits, const Tensor& bins, const Tensor& target,
                   const std::optional<Tensor>& second, double weight, double second_weight) {
  const int64_t count = check_logits(op, logits);
  const auto rows = leading(logits, 1);
  LossArgs a{rows_arg(op, "logits", logits, logits, "(..., V)", sizes_of(logits)),
             rows_arg(op, "bins", bins, logits, "(V,)", {count}),
             rows_arg(op, "target", target, logits, "(...)", rows), target, {}};
  if (second) a.second = rows_arg(op, "second", *second, logits, "(...)", rows);
  a.args = {ptr(a.logits), ptr(a.bins), {ptr(a.target), second ? ptr(a.second) : nullptr},
            {static_cast<float>(weight), static_cast<float>(second_weight)}, nullptr, nullptr, count};
  return a;
}

std::tuple<Tensor, Tensor> twohot_loss_cpu(Tensor logits, Tensor bins, Tensor target,
                                           std::optional<Tensor> second, double weight,
                                           double second_weight) {
  const LossArgs a = loss_args("twohot_loss", logits, bins, target, second, weight, second_weight);
  const auto rows = leading(logits, 1);
  Tensor loss = allocate(logits, rows), exp_sum = allocate(logits, rows);
  float *out = mutable_ptr(loss), *sums = mutable_ptr(exp_sum);
  parallel(product(rows), 4 * a.args.count,
           [&](int64_t begin, int64_t end) { twohot_loss(a.args, out, sums, begin, end); });
  return {loss, exp_sum};
}

Tensor twohot_loss_backward_cpu(Tensor grad_loss, Tensor exp_sum, Tensor logits, Tensor bins,
                                Tensor target, std::optional<Tensor> second, double weight,
                                double second_weight) {
  constexpr const char* op = "twohot_loss_backward";
  LossArgs a = loss_args(op, logits, bins, target, second, weight, second_weight);
  const auto rows = leading(logits, 1);
  const Tensor grad = rows_arg(op, "grad_loss", grad_loss, logits, "(...)", rows);
  const Tensor sums = rows_arg(op, "exp_sum", exp_sum, logits, "(...)", rows);
  a.args.grad_loss = ptr(grad);
  a.args.exp_sum = ptr(sums);
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  float* out = mutable_ptr(grad_logits);
  parallel(product(rows), 4 * a.args.count,
           [&](int64_t begin, int64_t end) { twohot_loss_backward(a.args, out, begin, end); });
  return grad_logits;
}

Tensor twohot_mean_cpu(Tensor logits, Tensor bins) {
  constexpr const char* op = "twohot_mean";
  const int64_t count = check_logits(op, logits);
  const auto rows = leading(logits, 1);
  const Tensor x = rows_arg(op, "logits", logits, logits, "(..., V)", sizes_of(logits));
  const Tensor b = rows_arg(op, "bins", bins, logits, "(V,)", {count});
  Tensor mean = allocate(logits, rows);
  const TwohotMean args{ptr(x), ptr(b), nullptr, count};
  float* out = mutable_ptr(mean);
  parallel(product(rows), 4 * count,
           [&](int64_t begin, int64_t end) { twohot_mean(args, out, begin, end); });
  return mean;
}

Tensor twohot_mean_backward_cpu(Tensor grad_mean, Tensor logits, Tensor bins) {
  constexpr const char* op = "twohot_mean_backward";
  const int64_t count = check_logits(op, logits);
  const auto rows = leading(logits, 1);
  const Tensor x = rows_arg(op, "logits", logits, logits, "(..., V)", sizes_of(logits));
  const Tensor b = rows_arg(op, "bins", bins, logits, "(V,)", {count});
  const Tensor grad = rows_arg(op, "grad_mean", grad_mean, logits, "(...)", rows);
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  const TwohotMean args{ptr(x), ptr(b), ptr(grad), count};
  float* out = mutable_ptr(grad_logits);
  parallel(product(rows), 4 * count,
           [&](int64_t begin, int64_t end) { twohot_mean_backward(args, out, begin, end); });
  return grad_logits;
}

Tensor twohot_mean_linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor bins) {
  constexpr const char* op = "twohot_mean_linear";
  check_min_dim(op, "x", x, "(..., U)", 1);
  check_float(op, "weight", weight, x, "(V, U)", {-1, x.size(x.dim() - 1)});
  const int64_t count = weight.size(0), inputs = weight.size(1);
  STD_TORCH_CHECK(1 <= count && count <= kMaxBins && inputs >= 1, op, ": expected 1 <= V <= ",
                  kMaxBins, " and U >= 1, got V = ", count, ", U = ", inputs);
  const Tensor rows = rows_arg(op, "x", x, x, "(..., U)", sizes_of(x)), w = dense(weight);
  const Tensor b = float_arg(op, "bias", bias, x, "(V,)", {count});
  const Tensor places = float_arg(op, "bins", bins, x, "(V,)", {count});
  Tensor mean = allocate(x, leading(x, 1));
  Tensor packed = allocate(x, {twohot_linear_packed_floats(count, inputs)});
  const TwohotMeanLinear args{ptr(rows), ptr(w), ptr(b), ptr(places), inputs, count,
                              mutable_ptr(packed)};
  twohot_linear_pack(args);
  float* out = mutable_ptr(mean);
  const int64_t total = product(leading(x, 1)), groups = (total + kMostRows - 1) / kMostRows;
  parallel(groups, kMostRows * count * (4 + inputs / 16), [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(total, end * kMostRows);
    twohot_mean_linear(args, out, begin * kMostRows, stop);
  });
  return mean;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("twohot_loss", TORCH_BOX(&fastwm::twohot_loss_cpu));
  m.impl("twohot_loss_backward", TORCH_BOX(&fastwm::twohot_loss_backward_cpu));
  m.impl("twohot_mean", TORCH_BOX(&fastwm::twohot_mean_cpu));
  m.impl("twohot_mean_linear", TORCH_BOX(&fastwm::twohot_mean_linear_cpu));
  m.impl("twohot_mean_backward", TORCH_BOX(&fastwm::twohot_mean_backward_cpu));
}
