// CPU bindings of the optim stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/optim.h"
#include "rows.h"

namespace fastwm {
namespace {

using Tensors = std::vector<Tensor>;
constexpr int64_t kChunk = 65536;

// Lists of float32 tensors of the same shapes; those that are written must lie row-major.
void check_list(const char* op, const char* name, const Tensors& list, const Tensors& like,
                bool written) {
  STD_TORCH_CHECK(list.size() == like.size(), op, ": expected ", like.size(), " ", name, ", got ",
                  list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(sizes_of(list[i]) == sizes_of(like[i]), op, ": expected ", name, "[", i,
                    "] of shape ", format_sizes(like[i].sizes()), ", got ",
                    format_sizes(list[i].sizes()));
    check_dtype(op, name, list[i], ScalarType::Float);
    check_same_device(op, name, list[i], like[0]);
    STD_TORCH_CHECK(!written || list[i].is_contiguous(), op, ": expected ", name, "[", i,
                    "] to be contiguous, it is written in place");
  }
}

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

std::tuple<Tensor, Tensor> laprop_agc_cpu(Tensors params, Tensors grads, Tensors mu, Tensors nu,
                                          Tensor step, Tensor lr, std::optional<Tensor> grad_scale,
                                          double agc, double pmin, double beta1, double beta2,
                                          double eps, double weight_decay,
                                          std::vector<int64_t> decay, bool nesterov) {
  constexpr const char* op = "laprop_agc_";
  check_list(op, "params", params, params, true);
  check_list(op, "grads", grads, params, false);
  check_list(op, "mu", mu, params, true);
  check_list(op, "nu", nu, params, true);
  STD_TORCH_CHECK(decay.size() == params.size(), op, ": expected ", params.size(),
                  " entries of decay, got ", decay.size());
  const double scale = grad_scale ? scalar_of(op, "grad_scale", *grad_scale) : 1.0;
  const double rate = scalar_of(op, "lr", lr), count = scalar_of(op, "step", step) + 1.0;
  for (Tensor& grad : grads) grad = dense(grad);

  const auto pieces = cut(params);
  const auto grad_norms = norms(grads, pieces);
  double total = 0.0;
  for (const double value : grad_norms) total += (value / scale) * (value / scale);
  total = std::sqrt(total);
  Tensor norm = allocate(lr, std::vector<int64_t>{}, ScalarType::Float);
  Tensor finite = allocate(lr, std::vector<int64_t>{}, ScalarType::Bool);
  *mutable_ptr(norm) = static_cast<float>(total);
  *mutable_ptr<bool>(finite) = std::isfinite(total);
  if (!std::isfinite(total)) return {norm, finite};

  std::vector<float> factors(params.size(), static_cast<float>(1.0 / scale));
  if (agc > 0.0) {
    const auto param_norms = norms(params, pieces);
    for (size_t i = 0; i < params.size(); ++i) {
      const double limit = agc * std::max(pmin, param_norms[i]);
      factors[i] = static_cast<float>(1.0 / (scale * std::max(1.0, grad_norms[i] / scale / limit)));
    }
  }
  const LapropSettings settings{
      static_cast<float>(rate), static_cast<float>(beta1), static_cast<float>(beta2),
      static_cast<float>(eps), static_cast<float>(1.0 / (1.0 - std::pow(beta1, count))),
      static_cast<float>(1.0 / (1.0 - std::pow(beta2, count))), nesterov};
  parallel(static_cast<int64_t>(pieces.size()), 4 * kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [t, start, size] = pieces[i];
      const LapropChunk chunk{mutable_ptr(params[t]) + start, mutable_ptr(mu[t]) + start,
                              mutable_ptr(nu[t]) + start, ptr(grads[t]) + start, size, factors[t],
                              decay[t] != 0 ? static_cast<float>(weight_decay) : 0.0f};
      laprop_update(chunk, settings);
    }
  });
  count_up(step);
  return {norm, finite};
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
  m.impl("ema_", TORCH_BOX(&fastwm::ema_cpu));
}
