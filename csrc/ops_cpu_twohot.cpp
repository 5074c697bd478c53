// CPU bindings of the two-hot stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/twohot.h"
#include "ranges.h"
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
             rows_arg(op, "target", target, logits, "(...)", rows),
             target,
             {}};
  if (second) a.second = rows_arg(op, "second", *second, logits, "(...)", rows);
  a.args = {ptr(a.logits),
            ptr(a.bins),
            {ptr(a.target), second ? ptr(a.second) : nullptr},
            {static_cast<float>(weight), static_cast<float>(second_weight)},
            nullptr,
            nullptr,
            count};
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

// The means of x W^T + b into `mean`, and the logits into `logits` unless it is null.
void run_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                const Tensor& bins, Tensor& mean, Tensor* logits) {
  const int64_t count = weight.size(0), inputs = weight.size(1);
  const Tensor rows = rows_arg(op, "x", x, x, "(..., U)", sizes_of(x)), w = dense(weight);
  const Tensor b = float_arg(op, "bias", bias, x, "(V,)", {count});
  const Tensor places = float_arg(op, "bins", bins, x, "(V,)", {count});
  Tensor packed = allocate(x, {twohot_linear_packed_floats(count, inputs)});
  const TwohotLinear args{ptr(rows),          ptr(w), ptr(b), ptr(places), inputs, count,
                          mutable_ptr(packed)};
  twohot_linear_pack(args);
  float *out = mutable_ptr(mean), *wide = logits == nullptr ? nullptr : mutable_ptr(*logits);
  const int64_t total = product(leading(x, 1)), groups = (total + kMostRows - 1) / kMostRows;
  parallel(groups, kMostRows * count * (4 + inputs / 16), [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(total, end * kMostRows);
    twohot_linear(args, wide, out, begin * kMostRows, stop);
  });
}

void check_linear(const char* op, const Tensor& x, const Tensor& weight) {
  check_min_dim(op, "x", x, "(..., U)", 1);
  check_float(op, "weight", weight, x, "(V, U)", {-1, x.size(x.dim() - 1)});
  const int64_t count = weight.size(0), inputs = weight.size(1);
  STD_TORCH_CHECK(1 <= count && count <= kMaxBins && inputs >= 1, op,
                  ": expected 1 <= V <= ", kMaxBins, " and U >= 1, got V = ", count,
                  ", U = ", inputs);
}

Tensor twohot_mean_linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor bins) {
  constexpr const char* op = "twohot_mean_linear";
  check_linear(op, x, weight);
  Tensor mean = allocate(x, leading(x, 1));
  run_linear(op, x, weight, bias, bins, mean, nullptr);
  return mean;
}

std::tuple<Tensor, Tensor> twohot_linear_cpu(Tensor x, Tensor weight, Tensor bias, Tensor bins) {
  constexpr const char* op = "twohot_linear";
  check_linear(op, x, weight);
  auto sizes = leading(x, 1);
  Tensor mean = allocate(x, sizes);
  sizes.push_back(weight.size(0));
  Tensor logits = allocate(x, sizes);
  run_linear(op, x, weight, bias, bins, mean, &logits);
  return {logits, mean};
}

std::tuple<Tensor, Tensor, Tensor> twohot_linear_backward_cpu(
    Tensor grad_loss, Tensor exp_sum, Tensor logits, Tensor bins, Tensor target,
    std::optional<Tensor> second, double weight, double second_weight, Tensor x, Tensor kernel,
    bool wants_x) {
  constexpr const char* op = "twohot_linear_backward";
  LossArgs a = loss_args(op, logits, bins, target, second, weight, second_weight);
  const auto rows = leading(logits, 1);
  const Tensor grad = rows_arg(op, "grad_loss", grad_loss, logits, "(...)", rows);
  const Tensor sums = rows_arg(op, "exp_sum", exp_sum, logits, "(...)", rows);
  check_linear(op, x, kernel);
  const int64_t count = a.args.count, inputs = kernel.size(1), total = product(rows);
  const Tensor w = float_arg(op, "kernel", kernel, logits, "(V, U)", {count, inputs});
  auto sizes = rows;
  sizes.push_back(inputs);
  const Tensor input = rows_arg(op, "x", x, logits, "(..., U)", sizes);
  a.args.grad_loss = ptr(grad);
  a.args.exp_sum = ptr(sums);

  Tensor packed = allocate(x, {twohot_linear_packed_floats(inputs, count)});
  TwohotLinearGrad args{a.args, ptr(input), ptr(w), inputs, mutable_ptr(packed)};
  twohot_linear_grad_pack(args);
  const Ranges ranges(total, kMostRows);
  const int64_t width = count * (inputs + 1), space = twohot_linear_workspace(args);
  Tensor grad_x = allocate(x, wants_x ? sizes : std::vector<int64_t>{0});
  Tensor grad_kernel = allocate(x, {count, inputs}), grad_bias = allocate(x, {count});
  Tensor sums_of_ranges = allocate(x, {ranges.count, width});
  Tensor scratch = allocate(x, {ranges.count, space});
  float* out = wants_x ? mutable_ptr(grad_x) : nullptr;
  float *parts = mutable_ptr(sums_of_ranges), *memory = mutable_ptr(scratch);
  ranges.run(total, 8 * count, [&](int64_t i, int64_t begin, int64_t end) {
    float* part = parts + i * width;
    std::fill(part, part + width, 0.0f);
    twohot_linear_backward(args, memory + i * space, out, part, part + count * inputs, begin, end);
  });
  const float* sum = fastwm::total(parts, ranges, width);
  std::copy(sum, sum + count * inputs, mutable_ptr(grad_kernel));
  std::copy(sum + count * inputs, sum + width, mutable_ptr(grad_bias));
  return {grad_x, grad_kernel, grad_bias};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("twohot_loss", TORCH_BOX(&fastwm::twohot_loss_cpu));
  m.impl("twohot_loss_backward", TORCH_BOX(&fastwm::twohot_loss_backward_cpu));
  m.impl("twohot_mean", TORCH_BOX(&fastwm::twohot_mean_cpu));
  m.impl("twohot_mean_linear", TORCH_BOX(&fastwm::twohot_mean_linear_cpu));
  m.impl("twohot_linear", TORCH_BOX(&fastwm::twohot_linear_cpu));
  m.impl("twohot_linear_backward", TORCH_BOX(&fastwm::twohot_linear_backward_cpu));
  m.impl("twohot_mean_backward", TORCH_BOX(&fastwm::twohot_mean_backward_cpu));
}
