// CUDA bindings of the gmm stem; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "cuda/gmm.h"
#include "gmm_args.h"
#include "on_device.h"

namespace fastwm {
namespace {

Tensor gmm_nll_cuda(Tensor target, Tensor mean, Tensor log_std, Tensor logits, bool joint) {
  const OnDeviceOf device(target);
  const GmmArguments a = gmm_arguments("gmm_nll", target, mean, log_std, logits, joint);
  Tensor nll = allocate(target, a.result_sizes);
  const auto run = joint ? cuda::gmm_joint_nll : cuda::gmm_factored_nll;
  STD_CUDA_CHECK(run(a.args, mutable_ptr(nll), a.rows, device.stream()));
  return nll;
}

std::tuple<Tensor, Tensor, Tensor> gmm_nll_backward_cuda(Tensor grad_nll, Tensor target,
                                                         Tensor mean, Tensor log_std, Tensor logits,
                                                         bool joint) {
  constexpr const char* op = "gmm_nll_backward";
  const OnDeviceOf device(target);
  GmmArguments a = gmm_arguments(op, target, mean, log_std, logits, joint);
  a.grad = rows_arg(op, "grad_nll", grad_nll, target, joint ? "(...)" : "(..., Z)", a.result_sizes);
  a.args.grad_nll = ptr(a.grad);
  Tensor grad_mean = allocate(target, a.param_sizes),
         grad_log_std = allocate(target, a.param_sizes);
  Tensor grad_logits = allocate(target, a.logit_sizes);
  const GmmGrads out{mutable_ptr(grad_mean), mutable_ptr(grad_log_std), mutable_ptr(grad_logits)};
  const auto run = joint ? cuda::gmm_joint_backward : cuda::gmm_factored_backward;
  STD_CUDA_CHECK(run(a.args, out, a.rows, device.stream()));
  return {grad_mean, grad_log_std, grad_logits};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("gmm_nll", TORCH_BOX(&fastwm::gmm_nll_cuda));
  m.impl("gmm_nll_backward", TORCH_BOX(&fastwm::gmm_nll_backward_cuda));
}
