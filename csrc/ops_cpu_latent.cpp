// CPU bindings of the latent stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include "latent_args.h"

namespace fastwm {
namespace {

std::tuple<Tensor, Tensor> latent_sample_cpu(Tensor logits, std::optional<Tensor> noise,
                                             double unimix) {
  LatentSampleCall call(logits, noise, unimix);
  float* out = mutable_ptr(call.log_probs);
  parallel(call.groups, 8 * call.args.classes, [&](int64_t begin, int64_t end) {
    if (call.small) {
      latent_sample(call.args, mutable_ptr<uint8_t>(call.index), out, begin, end);
    } else {
      latent_sample(call.args, mutable_ptr<int64_t>(call.index), out, begin, end);
    }
  });
  return {call.index, call.log_probs};
}

Tensor latent_one_hot_cpu(Tensor index, int64_t classes) {
  OneHotCall call(index, classes);
  float* out = mutable_ptr(call.result);
  parallel(call.groups, classes, [&](int64_t begin, int64_t end) {
    if (call.small) {
      one_hot(ptr<uint8_t>(call.from), out, classes, begin, end);
    } else {
      one_hot(ptr<int64_t>(call.from), out, classes, begin, end);
    }
  });
  return call.result;
}

Tensor latent_backward_cpu(Tensor grad, Tensor logits, double unimix, bool log) {
  LatentBackwardCall call(grad, logits, unimix, log);
  float* out = mutable_ptr(call.grad_logits);
  parallel(call.groups, 8 * call.args.classes,
           [&](int64_t begin, int64_t end) { latent_backward(call.args, out, begin, end); });
  return call.grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_balance_cpu(Tensor post, Tensor prior,
                                                                          double unimix,
                                                                          double free_nats,
                                                                          bool slopes) {
  const KlCall call(post, prior, unimix, free_nats, slopes);
  parallel(call.rows, 16 * call.args.groups * call.args.classes,
           [&](int64_t begin, int64_t end) { kl_balance(call.args, call.out, begin, end); });
  return call.results();
}

std::tuple<Tensor, Tensor> kl_balance_backward_cpu(Tensor grad_dyn, Tensor grad_rep,
                                                   Tensor slope_post, Tensor slope_prior) {
  KlBackwardCall call(grad_dyn, grad_rep, slope_post, slope_prior);
  float *to_post = mutable_ptr(call.grad_post), *to_prior = mutable_ptr(call.grad_prior);
  parallel(call.rows, 2 * call.columns, [&](int64_t begin, int64_t end) {
    scale_rows(ptr(call.rep), ptr(call.p), to_post, call.columns, begin, end);
    scale_rows(ptr(call.dyn), ptr(call.q), to_prior, call.columns, begin, end);
  });
  return {call.grad_post, call.grad_prior};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("latent_sample", TORCH_BOX(&fastwm::latent_sample_cpu));
  m.impl("latent_one_hot", TORCH_BOX(&fastwm::latent_one_hot_cpu));
  m.impl("latent_backward", TORCH_BOX(&fastwm::latent_backward_cpu));
  m.impl("kl_balance", TORCH_BOX(&fastwm::kl_balance_cpu));
  m.impl("kl_balance_backward", TORCH_BOX(&fastwm::kl_balance_backward_cpu));
}
