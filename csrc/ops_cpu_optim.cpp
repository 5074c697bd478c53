// CPU bindings of the optim stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/optim.h"
#include "optim_args.h"

namespace fastwm {
namespace {

constexpr int64_t kChunk = 65536;

struct Piece {
  size_t tensor;
  int64_t start, count;
};

std::vector<Piece> cut(const Tensors& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t total = tensors[i].numel();
    for (int64_t start = 0; start < total; start += kChunk) {
      pieces.push_back({i, start, std::min(kChunk, total - start)});
    }
  }
  return pieces;
}

// The 2-norm of every tensor; pieces are added in order, whatever the number of threads.
std::vector<double> norms(const Tensors& tensors, const std::vector<Piece>& pieces) {
  std::vector<double> parts(pieces.size()), result(tensors.size(), 0.0);
  parallel(static_cast<int64_t>(pieces.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      parts[i] = sum_of_squares(ptr(tensors[piece.tensor]) + piece.start, piece.count);
    }
  });
  for (size_t i = 0; i < pieces.size(); ++i) result[pieces[i].tensor] += parts[i];
  for (double& value : result) value = std::sqrt(value);
  return result;
}

double scalar_of(const char* op, const char* name, const Tensor& tensor) {
  check_shape(op, name, tensor, "()", {});
  if (tensor.scalar_type() == ScalarType::Long) return static_cast<double>(*ptr<int64_t>(tensor));
  check_dtype(op, name, tensor, ScalarType::Float);
  return *ptr(tensor);
}

void count_up(Tensor& step) {
  if (step.scalar_type() == ScalarType::Long) {
    *mutable_ptr<int64_t>(step) += 1;
  } else {
    *mutable_ptr(step) += 1.0f;
  }
}

// What both optimizers work on.
struct Lists {
  Tensors params, grads, mu, nu;
  std::vector<Piece> pieces;
  std::vector<double> grad_norms;
};

Lists lists_of(const char* op, const Tensors& params, const Tensors& grads, const Tensors& mu,
               const Tensors& nu, const std::vector<int64_t>& decay) {
  check_list(op, "params", params, params, true);
  check_list(op, "grads", grads, params, false);
  check_list(op, "mu", mu, params, true);
  check_list(op, "nu", nu, params, true);
  STD_TORCH_CHECK(decay.size() == params.size(), op, ": expected ", params.size(),
                  " entries of decay, got ", decay.size());
  Lists a{params, grads, mu, nu, cut(params), {}};
  for (Tensor& grad : a.grads) grad = dense(grad);
  a.grad_norms = norms(a.grads, a.pieces);
  return a;
}

// Copies that follow the parameters, written while these are in cache.
struct Copies {
  std::vector<float*> slow;  // of each parameter, or null
  float rate;
  std::vector<Bf16*> low;      // of each parameter, or empty

  void write(size_t tensor, int64_t start, const float* param, int64_t count) const {
    if (slow[tensor] != nullptr) ema_update(slow[tensor] + start, param, rate, count);
    if (!low.empty()) to_bfloat16(param, low[tensor] + start, count);
  }
};

Copies copies_of(const char* op, const Tensors& params, Tensors& slow,
                 const std::vector<int64_t>& slow_of, double rate, Tensors& low) {
  STD_TORCH_CHECK(slow.size() == slow_of.size(), op, ": expected ", slow.size(),
                  " entries of slow_of, got ", slow_of.size());
  Copies copies{std::vector<float*>(params.size(), nullptr), static_cast<float>(rate), {}};
  Tensors followed;
  for (const int64_t i : slow_of) {
    STD_TORCH_CHECK(0 <= i && i < static_cast<int64_t>(params.size()), op,
                    ": expected entries of slow_of in [0, ", params.size(), "), got ", i);
    followed.push_back(params[i]);
  }
  check_list(op, "slow", slow, followed, true);
  for (size_t i = 0; i < slow.size(); ++i) copies.slow[slow_of[i]] = mutable_ptr(slow[i]);
  if (low.empty()) return copies;
  check_list(op, "low", low, params, true, ScalarType::BFloat16);
  for (Tensor& tensor : low) {
    copies.low.push_back(static_cast<Bf16*>(tensor.mutable_data_ptr()));
  }
  return copies;
}

// Sets the norm of all gradients, unscaled; returns it with whether it is finite.
std::tuple<Tensor, Tensor> verdict(const Lists& a, double scale, const Tensor& like, double* norm) {
  double total = 0.0;
  for (const double value : a.grad_norms) total += (value / scale) * (value / scale);
  *norm = std::sqrt(total);
  Tensor result = allocate(like, std::vector<int64_t>{}, ScalarType::Float);
  Tensor finite = allocate(like, std::vector<int64_t>{}, ScalarType::Bool);
  *mutable_ptr(result) = static_cast<float>(*norm);
  *mutable_ptr<bool>(finite) = std::isfinite(*norm);
  return {result, finite};
}

float correction(double beta, double count) {
  return static_cast<float>(1.0 / (1.0 - std::pow(beta, count)));
}

// What one step has in common for all tensors; clip_value 0 means no bound.
OptimStep step_of(double lr, double beta1, double beta2, double eps, double count,
                  double clip_value, bool nesterov, bool decoupled) {
  return {static_cast<float>(lr),
          static_cast<float>(beta1),
          static_cast<float>(beta2),
          static_cast<float>(eps),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(1.0 - beta2),
          correction(beta1, count),
          correction(beta2, count),
          1.0f,
          0.0f,
          clip_value > 0.0 ? static_cast<float>(clip_value) : INFINITY,
          nesterov,
          decoupled};
}

// update(chunk, step) for every parameter, in blocks whose four arrays fit the second-level cache;
// `step` gets the factor and the decay of the tensor.
template <class F>
void update_all(Lists& a, OptimStep step, const std::vector<float>& factors, double weight_decay,
                const std::vector<int64_t>& decay, const Copies& copies, const F& update) {
  constexpr int64_t kBlock = 8192;
  parallel(static_cast<int64_t>(a.pieces.size()), 4 * kChunk, [&](int64_t begin, int64_t end) {
    OptimStep own = step;
    for (int64_t i = begin; i < end; ++i) {
      const auto [t, first, size] = a.pieces[i];
      own.grad_factor = factors[t];
      own.weight_decay = decay[t] != 0 ? static_cast<float>(weight_decay) : 0.0f;
      for (int64_t start = first; start < first + size; start += kBlock) {
        float* param = mutable_ptr(a.params[t]) + start;
        const int64_t count = std::min(kBlock, first + size - start);
        update(OptimChunk{param, mutable_ptr(a.mu[t]) + start, mutable_ptr(a.nu[t]) + start,
                          ptr(a.grads[t]) + start, count},
               own);
        copies.write(t, start, param, count);
      }
    }
  });
}

std::tuple<Tensor, Tensor> laprop_agc_cpu(
    Tensors params, Tensors grads, Tensors mu, Tensors nu, Tensor step, Tensor lr,
    std::optional<Tensor> grad_scale, double agc, double pmin, double beta1, double beta2,
    double eps, double weight_decay, std::vector<int64_t> decay, bool nesterov, Tensors slow,
    std::vector<int64_t> slow_of, double slow_rate, Tensors low) {
  constexpr const char* op = "laprop_agc_";
  Lists a = lists_of(op, params, grads, mu, nu, decay);
  const Copies copies = copies_of(op, params, slow, slow_of, slow_rate, low);
  const double scale = grad_scale ? scalar_of(op, "grad_scale", *grad_scale) : 1.0;
  const double rate = scalar_of(op, "lr", lr), count = scalar_of(op, "step", step) + 1.0;
  double norm = 0.0;
  const auto result = verdict(a, scale, lr, &norm);
  if (!std::isfinite(norm)) return result;

  std::vector<float> factors(params.size(), static_cast<float>(1.0 / scale));
  if (agc > 0.0) {
    const auto param_norms = norms(params, a.pieces);
    for (size_t i = 0; i < params.size(); ++i) {
      const double limit = agc * std::max(pmin, param_norms[i]);
      const double excess = std::max(1.0, a.grad_norms[i] / scale / limit);
      factors[i] = static_cast<float>(1.0 / (scale * excess));
    }
  }
  update_all(a, step_of(rate, beta1, beta2, eps, count, 0.0, nesterov, false), factors,
             weight_decay, decay, copies, laprop_update);
  count_up(step);
  return result;
}

std::tuple<Tensor, Tensor> adam_cpu(Tensors params, Tensors grads, Tensors mu, Tensors nu,
                                    Tensor step, Tensor lr, std::optional<Tensor> grad_scale,
                                    double clip_norm, double clip_value, double beta1, double beta2,
                                    double eps, double weight_decay, std::vector<int64_t> decay,
                                    bool decoupled, Tensors slow, std::vector<int64_t> slow_of,
                                    double slow_rate, Tensors low) {
  constexpr const char* op = "adam_";
  Lists a = lists_of(op, params, grads, mu, nu, decay);
  const Copies copies = copies_of(op, params, slow, slow_of, slow_rate, low);
  const double scale = grad_scale ? scalar_of(op, "grad_scale", *grad_scale) : 1.0;
  const double rate = scalar_of(op, "lr", lr), count = scalar_of(op, "step", step) + 1.0;
  double norm = 0.0;
  const auto result = verdict(a, scale, lr, &norm);
  if (!std::isfinite(norm)) return result;

  const double excess = clip_norm > 0.0 ? std::max(1.0, norm / clip_norm) : 1.0;
  const std::vector<float> factors(params.size(), static_cast<float>(1.0 / (scale * excess)));
  update_all(a, step_of(rate, beta1, beta2, eps, count, clip_value, false, decoupled), factors,
             weight_decay, decay, copies, adam_update);
  count_up(step);
  return result;
}

void ema_cpu(Tensors slow, Tensors fast, double rate, std::optional<Tensor> finite) {
  constexpr const char* op = "ema_";
  check_list(op, "slow", slow, slow, true);
  check_list(op, "fast", fast, slow, false);
  if (finite) {
    check_shape(op, "finite", *finite, "()", {});
    check_dtype(op, "finite", *finite, ScalarType::Bool);
    if (!*ptr<bool>(*finite)) return;
  }
  for (Tensor& tensor : fast) tensor = dense(tensor);
  const auto pieces = cut(slow);
  parallel(static_cast<int64_t>(pieces.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [t, start, size] = pieces[i];
      ema_update(mutable_ptr(slow[t]) + start, ptr(fast[t]) + start, static_cast<float>(rate),
                 size);
    }
  });
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("laprop_agc_", TORCH_BOX(&fastwm::laprop_agc_cpu));
  m.impl("adam_", TORCH_BOX(&fastwm::adam_cpu));
  m.impl("ema_", TORCH_BOX(&fastwm::ema_cpu));
}
