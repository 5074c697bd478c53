// CUDA bindings of the latent stem; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/latent.h"
#include "latent_args.h"
#include "on_device.h"

namespace fastwm {
namespace {

std::tuple<Tensor, Tensor> latent_sample_cuda(Tensor logits, std::optional<Tensor> noise,
                                              double unimix) {
  const OnDeviceOf device(logits);
  LatentSampleCall call(logits, noise, unimix);
  float* out = mutable_ptr(call.log_probs);
  if (call.small) {
    STD_CUDA_CHECK(cuda::latent_sample(call.args, mutable_ptr<uint8_t>(call.index), out,
                                       call.groups, device.stream()));
  } else {
    STD_CUDA_CHECK(cuda::latent_sample(call.args, mutable_ptr<int64_t>(call.index), out,
                                       call.groups, device.stream()));
  }
  return {call.index, call.log_probs};
}

Tensor latent_one_hot_cuda(Tensor index, int64_t classes) {
  const OnDeviceOf device(index);
  OneHotCall call(index, classes);
  float* out = mutable_ptr(call.result);
  const int64_t groups = call.groups;
  if (call.small) {
    STD_CUDA_CHECK(cuda::one_hot(ptr<uint8_t>(call.from), out, classes, groups, device.stream()));
  } else {
    STD_CUDA_CHECK(cuda::one_hot(ptr<int64_t>(call.from), out, classes, groups, device.stream()));
  }
  return call.result;
}

Tensor latent_backward_cuda(Tensor grad, Tensor logits, double unimix, bool log) {
  const OnDeviceOf device(logits);
  LatentBackwardCall call(grad, logits, unimix, log);
  STD_CUDA_CHECK(cuda::latent_backward(call.args, mutable_ptr(call.grad_logits), call.groups,
                                       device.stream()));
  return call.grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_balance_cuda(
    Tensor post, Tensor prior, double unimix, double free_nats, bool slopes) {
  const OnDeviceOf device(post);
  const KlCall call(post, prior, unimix, free_nats, slopes);
  STD_CUDA_CHECK(cuda::kl_balance(call.args, call.out, call.rows, device.stream()));
  return call.results();
}

std::tuple<Tensor, Tensor> kl_balance_backward_cuda(Tensor grad_dyn, Tensor grad_rep,
                                                    Tensor slope_post, Tensor slope_prior) {
  const OnDeviceOf device(slope_post);
  KlBackwardCall call(grad_dyn, grad_rep, slope_post, slope_prior);
  STD_CUDA_CHECK(cuda::scale_rows(ptr(call.rep), ptr(call.p), mutable_ptr(call.grad_post),
                                  call.columns, call.rows, device.stream()));
  STD_CUDA_CHECK(cuda::scale_rows(ptr(call.dyn), ptr(call.q), mutable_ptr(call.grad_prior),
                                  call.columns, call.rows, device.stream()));
  return {call.grad_post, call.grad_prior};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("latent_sample", TORCH_BOX(&fastwm::latent_sample_cuda));
  m.impl("latent_one_hot", TORCH_BOX(&fastwm::latent_one_hot_cuda));
  m.impl("latent_backward", TORCH_BOX(&fastwm::latent_backward_cuda));
  m.impl("kl_balance", TORCH_BOX(&fastwm::kl_balance_cuda));
  m.impl("kl_balance_backward", TORCH_BOX(&fastwm::kl_balance_backward_cuda));
}
