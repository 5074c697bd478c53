// What the bindings of the gmm stem share: checked arguments, for any device.
#pragma once

#include <vector>

#include "cpu/gmm.h"
#include "rows.h"

namespace fastwm {

// Whether a tensor is rows at a constant distance, each of them row-major over its last `inner`
// dimensions: a slice of a larger projection is. Sets the distance.
inline bool find_stride(const Tensor& tensor, int64_t inner, int64_t* stride) {
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
struct GmmArguments {
  Tensor target, mean, log_std, logits, grad;
  std::vector<int64_t> param_sizes, logit_sizes, result_sizes;
  int64_t rows;
  GmmNll args;
};

inline GmmParams params_arg(const char* op, const char* name, Tensor& tensor, const Tensor& like,
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

inline GmmArguments gmm_arguments(const char* op, const Tensor& target, const Tensor& mean,
                                  const Tensor& log_std, const Tensor& logits, bool joint) {
  check_min_dim(op, "target", target, "(..., Z)", 1);
  check_min_dim(op, "logits", logits, joint ? "(..., M)" : "(..., Z, M)", 1);
  const int64_t latents = target.size(target.dim() - 1);
  const int64_t components = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(1 <= components && components <= kMaxComponents, op,
                  ": expected 1 <= M <= ", kMaxComponents, ", got M = ", components);
  const char* letters = joint ? "(..., M, Z)" : "(..., Z, M)";
  GmmArguments a{rows_arg(op, "target", target, target, "(..., Z)", sizes_of(target)),
                 mean,
                 log_std,
                 logits,
                 target,
                 {},
                 {},
                 {},
                 0,
                 {}};
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
            nullptr,
            latents,
            components};
  return a;
}

}  // namespace fastwm
