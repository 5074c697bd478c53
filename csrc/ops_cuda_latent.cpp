// CUDA bindings of the latent stem; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>

#include "cuda/latent.h"
#include "on_device.h"
#include "rows.h"

namespace fastwm {
namespace {

// The last dimension of (…, K), and the checks that every op here shares.
int64_t check_latent(const char* op, const Tensor& logits, double unimix, int64_t dims) {
  check_min_dim(op, "logits", logits, dims == 2 ? "(..., S, K)" : "(..., K)", dims);
  const int64_t classes = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(classes >= 1, op, ": expected K >= 1, got K = ", classes);
  STD_TORCH_CHECK(unimix >= 0.0 && unimix <= 1.0, op, ": expected unimix in [0, 1], got ", unimix);
  return classes;
}

std::tuple<Tensor, Tensor> latent_sample_cuda(Tensor logits, std::optional<Tensor> noise,
                                              double unimix) {
  constexpr const char* op = "latent_sample";
  const int64_t classes = check_latent(op, logits, unimix, 1);
  const OnDeviceOf device(logits);
  const auto groups = leading(logits, 1);
  const Tensor x = rows_arg(op, "logits", logits, logits, "(..., K)", sizes_of(logits));
  Noise kind = Noise::kNone;
  Tensor draws = x;
  if (noise) {
    kind = noise->dim() == logits.dim() ? Noise::kGumbel : Noise::kUniform;
    const auto sizes = kind == Noise::kGumbel ? sizes_of(logits) : groups;
    draws = rows_arg(op, "noise", *noise, logits, "(...) or (..., K)", sizes);
  }
  const bool small = classes <= 256;
  Tensor index = allocate(logits, groups, small ? ScalarType::Byte : ScalarType::Long);
  Tensor log_probs = allocate(logits, sizes_of(logits));
  const LatentSample args{ptr(x), noise ? ptr(draws) : nullptr, kind, classes,
                          static_cast<float>(unimix)};
  const int64_t count = product(groups);
  float* out = mutable_ptr(log_probs);
  if (small) {
    STD_CUDA_CHECK(
        cuda::latent_sample(args, mutable_ptr<uint8_t>(index), out, count, device.stream()));
  } else {
    STD_CUDA_CHECK(
        cuda::latent_sample(args, mutable_ptr<int64_t>(index), out, count, device.stream()));
  }
  return {index, log_probs};
}

Tensor latent_one_hot_cuda(Tensor index, int64_t classes) {
  constexpr const char* op = "latent_one_hot";
  const bool small = index.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(small || index.scalar_type() == ScalarType::Long, op,
                  ": expected index of dtype Byte or Long, got ",
                  torch::headeronly::toString(index.scalar_type()));
  STD_TORCH_CHECK(classes >= 1, op, ": expected classes >= 1, got ", classes);
  const OnDeviceOf device(index);
  const Tensor from = dense(index);
  auto sizes = sizes_of(index);
  const int64_t groups = product(sizes);
  sizes.push_back(classes);
  Tensor result = allocate(index, sizes, ScalarType::Float);
  float* out = mutable_ptr(result);
  if (small) {
    STD_CUDA_CHECK(cuda::one_hot(ptr<uint8_t>(from), out, classes, groups, device.stream()));
  } else {
    STD_CUDA_CHECK(cuda::one_hot(ptr<int64_t>(from), out, classes, groups, device.stream()));
  }
  return result;
}

Tensor latent_backward_cuda(Tensor grad, Tensor logits, double unimix, bool log) {
  constexpr const char* op = "latent_backward";
  const int64_t classes = check_latent(op, logits, unimix, 1);
  const OnDeviceOf device(logits);
  const Tensor x = rows_arg(op, "logits", logits, logits, "(..., K)", sizes_of(logits));
  const Tensor g = rows_arg(op, "grad", grad, logits, "(..., K)", sizes_of(logits));
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  const LatentBackward args{ptr(g), ptr(x), classes, static_cast<float>(unimix), log};
  STD_CUDA_CHECK(cuda::latent_backward(args, mutable_ptr(grad_logits), product(leading(logits, 1)),
                                       device.stream()));
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_balance_cuda(
    Tensor post, Tensor prior, double unimix, double free_nats, bool slopes) {
  constexpr const char* op = "kl_balance";
  const int64_t classes = check_latent(op, post, unimix, 2);
  const OnDeviceOf device(post);
  const auto rows = leading(post, 2);
  const int64_t groups = post.size(post.dim() - 2);
  const Tensor p = rows_arg(op, "post", post, post, "(..., S, K)", sizes_of(post));
  const Tensor q = rows_arg(op, "prior", prior, post, "(..., S, K)", sizes_of(post));
  Tensor dyn = allocate(post, rows), rep = allocate(post, rows);
  Tensor post_entropy = allocate(post, rows), prior_entropy = allocate(post, rows);
  const std::vector<int64_t> none{0};
  Tensor slope_post = allocate(post, slopes ? sizes_of(post) : none);
  Tensor slope_prior = allocate(post, slopes ? sizes_of(post) : none);
  const KlBalance args{
      ptr(p), ptr(q), groups, classes, static_cast<float>(unimix), static_cast<float>(free_nats)};
  const KlOutputs out{mutable_ptr(dyn),
                      mutable_ptr(rep),
                      mutable_ptr(post_entropy),
                      mutable_ptr(prior_entropy),
                      slopes ? mutable_ptr(slope_post) : nullptr,
                      slopes ? mutable_ptr(slope_prior) : nullptr};
  STD_CUDA_CHECK(cuda::kl_balance(args, out, product(rows), device.stream()));
  return {dyn, rep, post_entropy, prior_entropy, slope_post, slope_prior};
}

std::tuple<Tensor, Tensor> kl_balance_backward_cuda(Tensor grad_dyn, Tensor grad_rep,
                                                    Tensor slope_post, Tensor slope_prior) {
  constexpr const char* op = "kl_balance_backward";
  check_min_dim(op, "slope_post", slope_post, "(..., S, K)", 2);
  const OnDeviceOf device(slope_post);
  const auto sizes = sizes_of(slope_post), rows = leading(slope_post, 2);
  const Tensor p = rows_arg(op, "slope_post", slope_post, slope_post, "(..., S, K)", sizes);
  const Tensor q = rows_arg(op, "slope_prior", slope_prior, slope_post, "(..., S, K)", sizes);
  const Tensor dyn = rows_arg(op, "grad_dyn", grad_dyn, slope_post, "(...)", rows);
  const Tensor rep = rows_arg(op, "grad_rep", grad_rep, slope_post, "(...)", rows);
  Tensor grad_post = allocate(slope_post, sizes), grad_prior = allocate(slope_post, sizes);
  const int64_t columns = sizes[sizes.size() - 2] * sizes[sizes.size() - 1], count = product(rows);
  STD_CUDA_CHECK(
      cuda::scale_rows(ptr(rep), ptr(p), mutable_ptr(grad_post), columns, count, device.stream()));
  STD_CUDA_CHECK(
      cuda::scale_rows(ptr(dyn), ptr(q), mutable_ptr(grad_prior), columns, count, device.stream()));
  return {grad_post, grad_prior};
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
