// CUDA bindings of the optim stem; see ops_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/optim.h"
#include "on_device.h"
#include "optim_args.h"

namespace fastwm {
namespace {

// Cuts [0, total) tensors into tables that fit a kernel's arguments, and their elements into
// chunks. fill(entry, i) sets what is particular to the table.
template <class Table, class Fill>
std::vector<Table> tables(const Tensors& tensors, const Fill& fill) {
  int64_t all = 0;
  for (const Tensor& tensor : tensors) all += tensor.numel();
  const int64_t elements = cuda::elements_of_block(all);
  std::vector<Table> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i % cuda::kTableTensors == 0) result.emplace_back().elements = elements;
    Table& table = result.back();
    auto& entry = table.tensor[table.tensors++];
    entry.count = tensors[i].numel();
    entry.first_chunk = table.chunks;
    table.chunks += static_cast<int32_t>((entry.count + elements - 1) / elements);
    fill(entry, i);
  }
  return result;
}

const float* scalar_ptr(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& like) {
  check_float(op, name, tensor, like, "()", {});
  return ptr(tensor);
}

// What both optimizers take, in the order of their schemas.
struct Lists {
  Tensors params, grads, mu, nu, slow, low;
  std::vector<int64_t> decay, slow_of;
};

void check_lists(const char* op, const Lists& a) {
  check_list(op, "params", a.params, a.params, true);
  check_list(op, "grads", a.grads, a.params, false);
  check_list(op, "mu", a.mu, a.params, true);
  check_list(op, "nu", a.nu, a.params, true);
  const int64_t count = static_cast<int64_t>(a.params.size());
  STD_TORCH_CHECK(static_cast<int64_t>(a.decay.size()) == count, op, ": expected ", count,
                  " entries of decay, got ", a.decay.size());
  STD_TORCH_CHECK(a.slow.size() == a.slow_of.size(), op, ": expected ", a.slow.size(),
                  " entries of slow_of, got ", a.slow_of.size());
  Tensors followed;
  for (const int64_t i : a.slow_of) {
    STD_TORCH_CHECK(0 <= i && i < count, op, ": expected entries of slow_of in [0, ", count,
                    "), got ", i);
    followed.push_back(a.params[i]);
  }
  check_list(op, "slow", a.slow, followed, true);
  if (!a.low.empty()) check_list(op, "low", a.low, a.params, true, ScalarType::BFloat16);
}

std::vector<cuda::OptimTable> optim_tables(Lists& a, double weight_decay) {
  std::vector<float*> slow(a.params.size(), nullptr);
  for (size_t i = 0; i < a.slow.size(); ++i) slow[a.slow_of[i]] = mutable_ptr(a.slow[i]);
  auto list = tables<cuda::OptimTable>(a.params, [&](cuda::OptimTensor& entry, size_t i) {
    entry.param = mutable_ptr(a.params[i]);
    entry.mu = mutable_ptr(a.mu[i]);
    entry.nu = mutable_ptr(a.nu[i]);
    entry.grad = ptr(a.grads[i]);
    entry.slow = slow[i];
    entry.low = a.low.empty() ? nullptr : static_cast<Bf16*>(a.low[i].mutable_data_ptr());
    entry.weight_decay = a.decay[i] != 0 ? static_cast<float>(weight_decay) : 0.0f;
  });
  if (list.empty()) list.emplace_back().elements = cuda::elements_of_block(0);
  list[0].first = true;
  for (size_t i = 1; i < list.size(); ++i) {
    list[i].chunk_offset = list[i - 1].chunk_offset + list[i - 1].chunks;
  }
  return list;
}

// Runs a step; `settings` holds what differs between the two, and what is the same is filled in.
std::tuple<Tensor, Tensor> update(const char* op, Lists a, cuda::OptimSettings settings,
                                  Tensor step, const Tensor& lr,
                                  const std::optional<Tensor>& grad_scale, double weight_decay) {
  check_lists(op, a);
  const Tensor& like = a.params.empty() ? lr : a.params[0];
  const OnDeviceOf device(like);
  for (Tensor& grad : a.grads) grad = dense(grad);
  check_shape(op, "step", step, "()", {});
  const bool counts = step.scalar_type() == ScalarType::Long;
  if (!counts) check_dtype(op, "step", step, ScalarType::Float);
  check_same_device(op, "step", step, like);
  settings.lr = scalar_ptr(op, "lr", lr, like);
  settings.grad_scale = grad_scale ? scalar_ptr(op, "grad_scale", *grad_scale, like) : nullptr;
  settings.step_long = counts ? mutable_ptr<int64_t>(step) : nullptr;
  settings.step_float = counts ? nullptr : mutable_ptr(step);

  const auto list = optim_tables(a, weight_decay);
  settings.chunks = list.back().chunk_offset + list.back().chunks;
  const std::vector<int64_t> scalar;
  Tensor norm = allocate(lr, scalar), finite = allocate(lr, scalar, ScalarType::Bool);
  Tensor sums = allocate(lr, {2, settings.chunks}, ScalarType::Double);
  Tensor corrections = allocate(lr, {2});
  settings.norm = mutable_ptr(norm);
  settings.finite = mutable_ptr<bool>(finite);
  double* const squares = mutable_ptr<double>(sums);
  const cuda::OptimState state{squares, squares + settings.chunks, mutable_ptr(corrections)};
  for (const auto& table : list) {
    STD_CUDA_CHECK(cuda::optim_sums(table, settings, state, device.stream()));
  }
  for (const auto& table : list) {
    STD_CUDA_CHECK(cuda::optim_update(table, settings, state, device.stream()));
  }
  return {norm, finite};
}

std::tuple<Tensor, Tensor> laprop_agc_cuda(Tensors params, Tensors grads, Tensors mu, Tensors nu,
                                           Tensor step, Tensor lr, std::optional<Tensor> grad_scale,
                                           double agc, double pmin, double beta1, double beta2,
                                           double eps, double weight_decay,
                                           std::vector<int64_t> decay, bool nesterov, Tensors slow,
                                           std::vector<int64_t> slow_of, double slow_rate,
                                           Tensors low) {
  cuda::OptimSettings settings{};
  settings.agc = agc;
  settings.pmin = pmin;
  settings.beta1 = beta1;
  settings.beta2 = beta2;
  settings.eps = static_cast<float>(eps);
  settings.nesterov = nesterov;
  settings.slow_rate = static_cast<float>(slow_rate);
  return update("laprop_agc_", {params, grads, mu, nu, slow, low, decay, slow_of}, settings, step,
                lr, grad_scale, weight_decay);
}

std::tuple<Tensor, Tensor> adam_cuda(Tensors params, Tensors grads, Tensors mu, Tensors nu,
                                     Tensor step, Tensor lr, std::optional<Tensor> grad_scale,
                                     double clip_norm, double clip_value, double beta1,
                                     double beta2, double eps, double weight_decay,
                                     std::vector<int64_t> decay, bool decoupled, Tensors slow,
                                     std::vector<int64_t> slow_of, double slow_rate, Tensors low) {
  cuda::OptimSettings settings{};
  settings.adam = true;
  settings.clip_norm = clip_norm;
  settings.clip_value = clip_value;
  settings.beta1 = beta1;
  settings.beta2 = beta2;
  settings.eps = static_cast<float>(eps);
  settings.decoupled = decoupled;
  settings.slow_rate = static_cast<float>(slow_rate);
  return update("adam_", {params, grads, mu, nu, slow, low, decay, slow_of}, settings, step, lr,
                grad_scale, weight_decay);
}

void ema_cuda(Tensors slow, Tensors fast, double rate, std::optional<Tensor> finite) {
  constexpr const char* op = "ema_";
  check_list(op, "slow", slow, slow, true);
  check_list(op, "fast", fast, slow, false);
  if (slow.empty()) return;
  const OnDeviceOf device(slow[0]);
  if (finite) {
    check_shape(op, "finite", *finite, "()", {});
    check_dtype(op, "finite", *finite, ScalarType::Bool);
    check_same_device(op, "finite", *finite, slow[0]);
  }
  for (Tensor& tensor : fast) tensor = dense(tensor);
  const auto list = tables<cuda::EmaTable>(slow, [&](cuda::EmaTensor& entry, size_t i) {
    entry.slow = mutable_ptr(slow[i]);
    entry.fast = ptr(fast[i]);
  });
  for (const auto& table : list) {
    STD_CUDA_CHECK(cuda::ema_update(table, static_cast<float>(rate),
                                    finite ? ptr<bool>(*finite) : nullptr, device.stream()));
  }
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("laprop_agc_", TORCH_BOX(&fastwm::laprop_agc_cuda));
  m.impl("adam_", TORCH_BOX(&fastwm::adam_cuda));
  m.impl("ema_", TORCH_BOX(&fastwm::ema_cuda));
}
