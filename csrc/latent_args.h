// Arguments and results of the latent ops, checked the same way for both devices. Every call owns
// the row-major copies that the kernel's pointers refer to.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/latent.h"
#include "rows.h"

namespace fastwm {

// The last dimension of (…, K), and the checks that every op here shares.
inline int64_t check_latent(const char* op, const Tensor& logits, double unimix, int64_t dims) {
  check_min_dim(op, "logits", logits, dims == 2 ? "(..., S, K)" : "(..., K)", dims);
  const int64_t classes = logits.size(logits.dim() - 1);
  STD_TORCH_CHECK(1 <= classes && classes <= kMaxClasses, op, ": expected 1 <= K <= ", kMaxClasses,
                  ", got K = ", classes);
  STD_TORCH_CHECK(unimix >= 0.0 && unimix <= 1.0, op, ": expected unimix in [0, 1], got ", unimix);
  return classes;
}

struct LatentSampleCall {
  Tensor x, draws, index, log_probs;
  LatentSample args;
  int64_t groups;
  bool small;  // index is uint8_t, not int64_t

  LatentSampleCall(const Tensor& logits, const std::optional<Tensor>& noise, double unimix) {
    constexpr const char* op = "latent_sample";
    const int64_t classes = check_latent(op, logits, unimix, 1);
    const auto rows = leading(logits, 1);
    x = rows_arg(op, "logits", logits, logits, "(..., K)", sizes_of(logits));
    Noise kind = Noise::kNone;
    if (noise) {
      kind = noise->dim() == logits.dim() ? Noise::kGumbel : Noise::kUniform;
      const auto sizes = kind == Noise::kGumbel ? sizes_of(logits) : rows;
      draws = rows_arg(op, "noise", *noise, logits, "(...) or (..., K)", sizes);
    }
    groups = product(rows), small = classes <= 256;
    index = allocate(logits, rows, small ? ScalarType::Byte : ScalarType::Long);
    log_probs = allocate(logits, sizes_of(logits));
    args = {ptr(x), noise ? ptr(draws) : nullptr, kind, classes, static_cast<float>(unimix)};
  }
};

struct OneHotCall {
  Tensor from, result;
  int64_t groups;
  bool small;

  OneHotCall(const Tensor& index, int64_t classes) {
    constexpr const char* op = "latent_one_hot";
    small = index.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(small || index.scalar_type() == ScalarType::Long, op,
                    ": expected index of dtype Byte or Long, got ",
                    torch::headeronly::toString(index.scalar_type()));
    STD_TORCH_CHECK(classes >= 1, op, ": expected classes >= 1, got ", classes);
    from = dense(index);
    auto sizes = sizes_of(index);
    groups = product(sizes);
    sizes.push_back(classes);
    result = allocate(index, sizes, ScalarType::Float);
  }
};

struct LatentBackwardCall {
  Tensor x, g, grad_logits;
  LatentBackward args;
  int64_t groups;

  LatentBackwardCall(const Tensor& grad, const Tensor& logits, double unimix, bool log) {
    constexpr const char* op = "latent_backward";
    const int64_t classes = check_latent(op, logits, unimix, 1);
    x = rows_arg(op, "logits", logits, logits, "(..., K)", sizes_of(logits));
    g = rows_arg(op, "grad", grad, logits, "(..., K)", sizes_of(logits));
    grad_logits = allocate(logits, sizes_of(logits));
    groups = product(leading(logits, 1));
    args = {ptr(g), ptr(x), classes, static_cast<float>(unimix), log};
  }
};

struct KlCall {
  Tensor p, q, dyn, rep, post_entropy, prior_entropy, slope_post, slope_prior;
  KlBalance args;
  KlOutputs out;
  int64_t rows;

  KlCall(const Tensor& post, const Tensor& prior, double unimix, double free_nats, bool slopes) {
    constexpr const char* op = "kl_balance";
    const int64_t classes = check_latent(op, post, unimix, 2);
    const auto lead = leading(post, 2);
    p = rows_arg(op, "post", post, post, "(..., S, K)", sizes_of(post));
    q = rows_arg(op, "prior", prior, post, "(..., S, K)", sizes_of(post));
    for (Tensor* value : {&dyn, &rep, &post_entropy, &prior_entropy}) *value = allocate(post, lead);
    const std::vector<int64_t> sizes = slopes ? sizes_of(post) : std::vector<int64_t>{0};
    slope_post = allocate(post, sizes), slope_prior = allocate(post, sizes);
    rows = product(lead);
    args = {ptr(p),
            ptr(q),
            post.size(post.dim() - 2),
            classes,
            static_cast<float>(unimix),
            static_cast<float>(free_nats)};
    out = {mutable_ptr(dyn),
           mutable_ptr(rep),
           mutable_ptr(post_entropy),
           mutable_ptr(prior_entropy),
           slopes ? mutable_ptr(slope_post) : nullptr,
           slopes ? mutable_ptr(slope_prior) : nullptr};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {dyn, rep, post_entropy, prior_entropy, slope_post, slope_prior};
  }
};

struct KlBackwardCall {
  Tensor p, q, dyn, rep, grad_post, grad_prior;
  int64_t rows, columns;

  KlBackwardCall(const Tensor& grad_dyn, const Tensor& grad_rep, const Tensor& slope_post,
                 const Tensor& slope_prior) {
    constexpr const char* op = "kl_balance_backward";
    check_min_dim(op, "slope_post", slope_post, "(..., S, K)", 2);
    const auto sizes = sizes_of(slope_post), lead = leading(slope_post, 2);
    p = rows_arg(op, "slope_post", slope_post, slope_post, "(..., S, K)", sizes);
    q = rows_arg(op, "slope_prior", slope_prior, slope_post, "(..., S, K)", sizes);
    dyn = rows_arg(op, "grad_dyn", grad_dyn, slope_post, "(...)", lead);
    rep = rows_arg(op, "grad_rep", grad_rep, slope_post, "(...)", lead);
    grad_post = allocate(slope_post, sizes), grad_prior = allocate(slope_post, sizes);
    rows = product(lead), columns = sizes[sizes.size() - 2] * sizes[sizes.size() - 1];
  }
};

}  // namespace fastwm
