// CPU bindings of the gmm stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gmm_args.h"

namespace fastwm {
namespace {

Tensor gmm_nll_cpu(Tensor target, Tensor mean, Tensor log_std, Tensor logits, bool joint) {
  const GmmArguments a = gmm_arguments("gmm_nll", target, mean, log_std, logits, joint);
  Tensor nll = allocate(target, a.result_sizes);
  float* out = mutable_ptr(nll);
  parallel(a.rows, 8 * a.args.latents * a.args.components, [&](int64_t begin, int64_t end) {
    (joint ? gmm_joint_nll : gmm_factored_nll)(a.args, out, begin, end);
  });
  return nll;
}

std::tuple<Tensor, Tensor, Tensor> gmm_nll_backward_cpu(Tensor grad_nll, Tensor target, Tensor mean,
                                                        Tensor log_std, Tensor logits, bool joint) {
  constexpr const char* op = "gmm_nll_backward";
  GmmArguments a = gmm_arguments(op, target, mean, log_std, logits, joint);
  a.grad = rows_arg(op, "grad_nll", grad_nll, target, joint ? "(...)" : "(..., Z)", a.result_sizes);
  a.args.grad_nll = ptr(a.grad);
  Tensor grad_mean = allocate(target, a.param_sizes), grad_log_std = allocate(target, a.param_sizes);
  Tensor grad_logits = allocate(target, a.logit_sizes);
  const GmmGrads out{mutable_ptr(grad_mean), mutable_ptr(grad_log_std), mutable_ptr(grad_logits)};
  parallel(a.rows, 8 * a.args.latents * a.args.components, [&](int64_t begin, int64_t end) {
    (joint ? gmm_joint_backward : gmm_factored_backward)(a.args, out, begin, end);
  });
  return {grad_mean, grad_log_std, grad_logits};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("gmm_nll", TORCH_BOX(&fastwm::gmm_nll_cpu));
  m.impl("gmm_nll_backward", TORCH_BOX(&fastwm::gmm_nll_backward_cpu));
}
