// CPU bindings of the gmm stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/gmm.h"
#include "rows.h"

namespace fastwm {
namespace {

// Whether a tensor is rows at a constant distance, each of them row-major over its last `inner`
// dimensions: a slice of a larger projection is. Sets the distance.
bool find_stride(const Tensor& tensor, int64_t inner, int64_t* stride) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  int64_t dim = tensor.dim() - 1;
  for (; dim >= tensor.dim() - inner; --dim) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  *stride = expected;
  bool found = false;
  for (; dim >= 0; --dim) {
    if (sizes[dim] == 1) continue;
    if (found && strides[dim] != expected) return false;
    if (!found) *stride = strides[dim];
    found = true;
    expected = strides[dim] * sizes[dim];
  }
  return true;
}

// Keeps copies alive for as long as the kernel's pointers are used.
struct Arguments {
  Tensor target, mean, log_std, logits, grad;
  std::vector<int64_t> param_sizes, logit_sizes, result_sizes;
  int64_t rows;
  GmmNll args;
};

GmmParams params_arg(const char* op, const char* name, Tensor& tensor, const Tensor& like,
                     const char* letters, const std::vector<int64_t>& sizes, int64_t inner) {
  check_rows(op, name, tensor, like, letters, sizes);
  int64_t stride = 0;
  if (!find_stride(tensor, inner, &stride)) {
    tensor = dense(tensor);
    stride = 1;
    for (int64_t i = 1; i <= inner; ++i) stride *= sizes[sizes.size() - i];
  }
  return {ptr(tensor), stride};
}

Arguments arguments(const char* op, const Tensor& target, const Tensor& mean,
                    const Tensor& log_std, const Tensor& logits, bool joint) {
  check_min_dim(op, "target", target, "(..., Z)", 1);
  check_min_dim(op, "logits", logits, joint ? "(..., M)" : "(..., Z, M)", 1);
  const int64_t latents = target.size(target.dim() - 1);
  const int64_t components = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(1 <= components && components <= kMaxComponents, op, ": expected 1 <= M <= ",
                  kMaxComponents, ", got M = ", components);
  const char* letters = joint ? "(..., M, Z)" : "(..., Z, M)";
  Arguments a{rows_arg(op, "target", target, target, "(..., Z)", sizes_of(target)),
              mean, log_std, logits, target, {}, {}, {}, 0, {}};
  a.result_sizes = joint ? leading(target, 1) : sizes_of(target);
  a.param_sizes = leading(target, 1);
  a.rows = product(a.param_sizes);
  a.logit_sizes = a.param_sizes;
  a.param_sizes.push_back(joint ? components : latents);
  a.param_sizes.push_back(joint ? latents : components);
  a.logit_sizes.push_back(components);
  if (!joint) a.logit_sizes = a.param_sizes;
  a.args = {ptr(a.target),
            params_arg(op, "mean", a.mean, target, letters, a.param_sizes, 2),
            params_arg(op, "log_std", a.log_std, target, letters, a.param_sizes, 2),
            params_arg(op, "logits", a.logits, target, joint ? "(..., M)" : letters, a.logit_sizes,
                       joint ? 1 : 2),
            nullptr, latents, components};
  return a;
}

Tensor gmm_nll_cpu(Tensor target, Tensor mean, Tensor log_std, Tensor logits, bool joint) {
  const Arguments a = arguments("gmm_nll", target, mean, log_std, logits, joint);
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
  Arguments a = arguments(op, target, mean, log_std, logits, joint);
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
