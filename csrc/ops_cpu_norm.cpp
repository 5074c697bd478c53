// CPU bindings of the norm stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/norm.h"
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

  // The rows are cut into ranges that do not depend on the number of threads, and their sums are
  // added in order: two runs are equal bit by bit on any machine.
  const int64_t range = std::max<int64_t>(32, (rows + 15) / 16);
  const int64_t ranges = std::max<int64_t>(1, (rows + range - 1) / range);
  Tensor grad_x = allocate(x, sizes_of(x)), sums = allocate(x, {ranges, features});
  Tensor grad_scale = allocate(x, {features});
  const RmsSilu args{ptr(input), ptr(gain), ptr(grad), features, static_cast<float>(eps)};
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums), *total = mutable_ptr(grad_scale);
  parallel(ranges, 8 * range * features, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rms_silu_backward(args, out, parts + i * features, i * range,
                        std::min(rows, (i + 1) * range));
    }
  });
  for (int64_t u = 0; u < features; ++u) total[u] = parts[u];
  for (int64_t i = 1; i < ranges; ++i) {
    for (int64_t u = 0; u < features; ++u) total[u] += parts[i * features + u];
  }
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("rms_silu", TORCH_BOX(&fastwm::rms_silu_cpu));
  m.impl("rms_silu_backward", TORCH_BOX(&fastwm::rms_silu_backward_cpu));
}
