// CUDA bindings of the dense GRU step of 2023; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/rssm_layernorm.h"
#include "on_device.h"
#include "rssm_layernorm_args.h"

namespace fastwm {
namespace {

Tensor gru_layernorm_cuda(Tensor parts, Tensor scale, Tensor shift, Tensor deter, double eps) {
  const GruLayerNormCall in("gru_layernorm", parts, scale, shift, deter);
  const OnDeviceOf device(deter);
  Tensor result = allocate(deter, {in.rows, in.width});
  STD_CUDA_CHECK(cuda::gru_layernorm(in.kernel(nullptr, eps), mutable_ptr(result), in.rows,
                                     device.stream()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_layernorm_backward_cuda(Tensor grad, Tensor parts,
                                                                       Tensor scale, Tensor shift,
                                                                       Tensor deter, double eps) {
  constexpr const char* op = "gru_layernorm_backward";
  const GruLayerNormCall in(op, parts, scale, shift, deter);
  const int64_t rows = in.rows, width = in.width;
  const Tensor upper = float_arg(op, "grad", grad, deter, "(N, D)", {rows, width});
  const OnDeviceOf device(deter);
  Tensor grad_parts = allocate(deter, {rows, 3 * width}), grad_deter = allocate(deter, {rows, width});
  Tensor grad_scale = allocate(deter, {3 * width}), grad_shift = allocate(deter, {3 * width});
  Tensor moments = allocate(deter, {rows, 4});
  Tensor sums = allocate(deter, {cuda::gru_layernorm_ranges(rows), 6 * width});
  const cuda::GruLayerNormGrads to{mutable_ptr(grad_parts), mutable_ptr(grad_scale),
                                   mutable_ptr(grad_shift), mutable_ptr(grad_deter),
                                   mutable_ptr(moments),    mutable_ptr(sums)};
  STD_CUDA_CHECK(
      cuda::gru_layernorm_backward(in.kernel(ptr(upper), eps), to, rows, device.stream()));
  return {grad_parts, grad_scale, grad_shift, grad_deter};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("gru_layernorm", TORCH_BOX(&fastwm::gru_layernorm_cuda));
  m.impl("gru_layernorm_backward", TORCH_BOX(&fastwm::gru_layernorm_backward_cuda));
}
