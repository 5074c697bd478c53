// CPU bindings of the norm stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/norm.h"
#include "ranges.h"
#include "rows.h"

namespace fastwm {
namespace {

Tensor rms_silu_cpu(Tensor x, Tensor scale, double eps) {
  constexpr const char* op = "rms_silu";
  check_min_dim(op, "x", x, "(..., U)", 1);
  const int64_t features = x.size(x.dim() - 1);
  const Tensor input = rows_arg(op, "x", x, x, "(..., U)", sizes_of(x));
  const Tensor gain = rows_arg(op, "scale", scale, x, "(U,)", {features});

  Tensor y = allocate(x, sizes_of(x));
  const RmsSilu args{ptr(input), ptr(gain), nullptr, features, static_cast<float>(eps)};
  float* out = mutable_ptr(y);
  parallel(product(leading(x, 1)), 4 * features,
           [&](int64_t begin, int64_t end) { rms_silu(args, out, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> rms_silu_backward_cpu(Tensor grad_y, Tensor x, Tensor scale,
                                                 double eps) {
  constexpr const char* op = "rms_silu_backward";
  check_min_dim(op, "x", x, "(..., U)", 1);
  const int64_t features = x.size(x.dim() - 1), rows = product(leading(x, 1));
  const Tensor input = rows_arg(op, "x", x, x, "(..., U)", sizes_of(x));
  const Tensor gain = rows_arg(op, "scale", scale, x, "(U,)", {features});
  const Tensor grad = rows_arg(op, "grad_y", grad_y, x, "(..., U)", sizes_of(x));

  const Ranges ranges(rows, 32);
  Tensor grad_x = allocate(x, sizes_of(x)), sums = allocate(x, {ranges.count, features});
  Tensor grad_scale = allocate(x, {features});
  const RmsSilu args{ptr(input), ptr(gain), ptr(grad), features, static_cast<float>(eps)};
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums);
  ranges.run(rows, 8 * features, [&](int64_t i, int64_t begin, int64_t end) {
    rms_silu_backward(args, out, parts + i * features, begin, end);
  });
  const float* sum = total(parts, ranges, features);
  std::copy(sum, sum + features, mutable_ptr(grad_scale));
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("rms_silu", TORCH_BOX(&fastwm::rms_silu_cpu));
  m.impl("rms_silu_backward", TORCH_BOX(&fastwm::rms_silu_backward_cpu));
}
