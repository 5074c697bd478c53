// CPU bindings of the dense GRU step of 2023; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rssm_layernorm_args.h"

namespace fastwm {
namespace {

Tensor gru_layernorm_cpu(Tensor parts, Tensor scale, Tensor shift, Tensor deter, double eps) {
  const GruLayerNormCall in("gru_layernorm", parts, scale, shift, deter);
  Tensor result = allocate(deter, {in.rows, in.width});
  const GruLayerNorm args = in.kernel(nullptr, eps);
  float* out = mutable_ptr(result);
  parallel(in.rows, 24 * in.width,
           [&](int64_t begin, int64_t end) { gru_layernorm(args, out, begin, end); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_layernorm_backward_cpu(Tensor grad, Tensor parts,
                                                                      Tensor scale, Tensor shift,
                                                                      Tensor deter, double eps) {
  constexpr const char* op = "gru_layernorm_backward";
  const GruLayerNormCall in(op, parts, scale, shift, deter);
  const int64_t rows = in.rows, width = in.width, affine = 6 * width;
  const Tensor upper = float_arg(op, "grad", grad, deter, "(N, D)", {rows, width});

  // Ranges that do not depend on the number of threads, added in order: see ops_cpu_norm.cpp.
  const int64_t range = std::max<int64_t>(32, (rows + 15) / 16);
  const int64_t ranges = std::max<int64_t>(1, (rows + range - 1) / range);
  Tensor grad_parts = allocate(deter, {rows, 3 * width}), grad_deter = allocate(deter, {rows, width});
  Tensor sums = allocate(deter, {ranges, affine});
  Tensor grad_scale = allocate(deter, {3 * width}), grad_shift = allocate(deter, {3 * width});
  const GruLayerNorm args = in.kernel(ptr(upper), eps);
  float *to_parts = mutable_ptr(grad_parts), *to_deter = mutable_ptr(grad_deter);
  float* partial = mutable_ptr(sums);
  parallel(ranges, 48 * range * width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      gru_layernorm_backward(args, to_parts, to_deter, partial + i * affine, i * range,
                             std::min(rows, (i + 1) * range));
    }
  });
  for (int64_t i = 1; i < ranges; ++i) {
    for (int64_t u = 0; u < affine; ++u) partial[u] += partial[i * affine + u];
  }
  std::copy(partial, partial + 3 * width, mutable_ptr(grad_scale));
  std::copy(partial + 3 * width, partial + affine, mutable_ptr(grad_shift));
  return {grad_parts, grad_scale, grad_shift, grad_deter};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("gru_layernorm", TORCH_BOX(&fastwm::gru_layernorm_cpu));
  m.impl("gru_layernorm_backward", TORCH_BOX(&fastwm::gru_layernorm_backward_cpu));
}
