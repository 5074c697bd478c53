// The arguments of the raw RSSM ops, checked once for every device: shapes, dtypes, devices,
// row-major copies, and the outputs. What is left to a binding is memory of its own and the run.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/rssm.h"
#include "tensor.h"

namespace fastwm {

using Tensors = std::vector<Tensor>;

// Owns the row-major copies that the kernel's pointers refer to.
struct Inputs {
  const char* op;
  const Tensor& like;
  Tensors kept;

  const float* take(const char* name, const Tensor& tensor, const char* letters,
                    std::initializer_list<int64_t> sizes) {
    kept.push_back(float_arg(op, name, tensor, like, letters, sizes));
    return ptr(kept.back());
  }
  const bool* flags(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    check_shape(op, name, tensor, "(B, T)", sizes);
    check_dtype(op, name, tensor, ScalarType::Bool);
    check_same_device(op, name, tensor, like);
    kept.push_back(dense(tensor));
    return ptr<bool>(kept.back());
  }
};

// `weights` in the order of fastwm/ops/_rssm_sequence.py flatten().
inline RssmWeights read_weights(Inputs& in, const Tensors& weights, int64_t hidden, RssmSizes& n) {
  const int64_t count = (int64_t)weights.size(), rest = count - 9 - 3 * hidden - 4;
  STD_TORCH_CHECK(
      hidden >= 1 && hidden <= kRssmLayers && rest >= 3 && rest % 3 == 0 && rest / 3 <= kRssmLayers,
      in.op, ": expected weights of 3 + ", hidden, " + 1..", kRssmLayers,
      " layers of three tensors and 2 of two, got ", count, " tensors");
  check_shape(in.op, "deter_in weight", weights[0], "(U, D)", {-1, -1});
  const size_t gru = 9 + 3 * hidden;
  check_shape(in.op, "gru weight", weights[gru], "(G, D/G, 3D/G)", {-1, -1, -1});
  check_shape(in.op, "post weight", weights[gru + 2], "(U, D+E)", {-1, -1});
  n.units = weights[0].size(0), n.deter = weights[0].size(1), n.blocks = weights[gru].size(0);
  n.hidden_layers = hidden, n.post_layers = rest / 3;
  n.embed = weights[gru + 2].size(1) - n.deter;
  STD_TORCH_CHECK(
      n.units > 0 && n.deter > 0 && n.blocks > 0 && n.deter % n.blocks == 0 && n.embed >= 0, in.op,
      ": expected D a multiple of G and a posterior of width D+E, got D = ", n.deter,
      ", G = ", n.blocks, ", width ", n.deter + n.embed);
  const int64_t d = n.block(), u = n.units, z = n.stoch();
  size_t next = 0;
  auto layer = [&](const char* name, std::initializer_list<int64_t> sizes, int64_t width,
                   bool scaled) {
    RssmLayer out{in.take(name, weights[next], "(out, in)", sizes), nullptr, nullptr};
    out.bias = in.take(name, weights[next + 1], "(out)", {width});
    if (scaled) out.scale = in.take(name, weights[next + 2], "(out)", {width});
    next += scaled ? 3 : 2;
    return out;
  };
  RssmWeights w;
  w.deter_in = layer("deter_in", {u, n.deter}, u, true);
  w.stoch_in = layer("stoch_in", {u, z}, u, true);
  if (n.actions > 0) {
    w.action_in = layer("action_in", {u, n.actions}, u, true);
  } else {
    next += 3;  // no part of the sequence's loop
  }
  for (int64_t i = 0; i < hidden; ++i) {
    w.hidden[i] = layer("hidden", {n.blocks, i == 0 ? d + 3 * u : d, d}, n.deter, true);
  }
  w.gru = layer("gru", {n.blocks, d, 3 * d}, 3 * n.deter, false);
  for (int64_t i = 0; i < n.post_layers; ++i) {
    w.post[i] = layer("post", {u, i == 0 ? n.deter + n.embed : u}, u, true);
  }
  w.post_logit = layer("post_logit", {z, u}, z, false);
  return w;
}

inline RssmSizes read_sizes(const char* op, int64_t groups, int64_t classes,
                            const Tensor& is_first) {
  check_shape(op, "is_first", is_first, "(B, T)", {-1, -1});
  RssmSizes n{};
  n.batch = is_first.size(0), n.time = is_first.size(1);
  n.groups = groups, n.classes = classes;
  STD_TORCH_CHECK(n.groups >= 1 && n.classes >= 1, op, ": expected S and K >= 1, got ", n.groups,
                  " and ", n.classes);
  return n;
}

// With `save` every step is kept and returned; without, one step's memory serves them all.
inline Tensor keep(const Tensor& like, const RssmSizes& n, int64_t width, bool save,
                   RssmView& view) {
  Tensor tensor = allocate(like, {n.batch, save ? n.time : 1, width});
  view.data = mutable_ptr(tensor);
  view.row = save ? n.time * width : width;
  view.step = save ? width : 0;
  return tensor;
}

// The arguments and outputs of rssm_scan: deter, logits, index, inner, gates, hidden..., post...
inline Tensors scan_args(RssmScan& a, Inputs& in, const Tensors& weights, int64_t hidden,
                         const Tensor& deter, const Tensor& stoch, const Tensor& action_part,
                         const Tensor& token_part, const Tensor& is_first,
                         const std::optional<Tensor>& noise, double unimix, bool save) {
  check_shape(in.op, "stoch", stoch, "(B, S, K)", {-1, -1, -1});
  a.size = read_sizes(in.op, stoch.size(1), stoch.size(2), is_first);
  a.weights = read_weights(in, weights, hidden, a.size);
  const RssmSizes& n = a.size;
  a.deter = in.take("deter", deter, "(B, D)", {n.batch, n.deter});
  a.stoch = in.take("stoch", stoch, "(B, S, K)", {n.batch, n.groups, n.classes});
  a.deter_row = n.deter, a.stoch_row = n.stoch();
  a.action_part = in.take("action_part", action_part, "(B, T, D)", {n.batch, n.time, n.deter});
  a.token_part = in.take("token_part", token_part, "(B, T, U)", {n.batch, n.time, n.units});
  a.is_first = in.flags("is_first", is_first, {n.batch, n.time});
  if (noise) a.noise = in.take("noise", *noise, "(B, T, S)", {n.batch, n.time, n.groups});
  a.unimix = (float)unimix;

  const bool small = n.classes <= 256;
  Tensor index =
      allocate(deter, {n.batch, n.time, n.groups}, small ? ScalarType::Byte : ScalarType::Long);
  if (small) a.index8 = mutable_ptr<uint8_t>(index);
  if (!small) a.index64 = mutable_ptr<int64_t>(index);
  Tensors out{keep(deter, n, n.deter, true, a.out_deter), keep(deter, n, n.stoch(), true, a.logits),
              index};
  out.push_back(keep(deter, n, 2 * n.units, save, a.inner));
  out.push_back(keep(deter, n, 3 * n.deter, save, a.gates));
  for (int64_t i = 0; i < hidden; ++i) out.push_back(keep(deter, n, n.deter, save, a.hidden[i]));
  for (int64_t i = 0; i < n.post_layers; ++i) {
    out.push_back(keep(deter, n, n.units, save, a.post[i]));
  }
  return out;
}

// The arguments and outputs of rssm_scan_backward: carry (B, D), d_logits, d_inner, d_gates,
// act_inner, then of every hidden layer d, act, of every posterior layer d, act, then the gradients
// of the scales by row. `saved` is what rssm_scan returned.
inline Tensors scan_backward_args(RssmScanGrad& a, Inputs& in, const Tensors& weights,
                                  int64_t hidden, const Tensors& saved, const Tensor& deter,
                                  const Tensor& is_first, double unimix, const Tensor& grad_deter,
                                  const Tensor& grad_logits, const Tensor& grad_stoch) {
  check_shape(in.op, "grad_stoch", grad_stoch, "(B, T, S, K)", {-1, -1, -1, -1});
  a.size = read_sizes(in.op, grad_stoch.size(2), grad_stoch.size(3), is_first);
  a.weights = read_weights(in, weights, hidden, a.size);
  const RssmSizes& n = a.size;
  const int64_t b = n.batch, t = n.time, u = n.units, d = n.deter, z = n.stoch();
  STD_TORCH_CHECK((int64_t)saved.size() == 5 + n.hidden_layers + n.post_layers, in.op,
                  ": expected saved to hold what rssm_scan returned, ",
                  5 + n.hidden_layers + n.post_layers, " tensors, got ", saved.size());
  a.deter0 = in.take("deter", deter, "(B, D)", {b, d});
  a.deter = in.take("saved deter", saved[0], "(B, T, D)", {b, t, d});
  a.logits = in.take("saved logits", saved[1], "(B, T, S*K)", {b, t, z});
  a.inner = in.take("saved inner", saved[3], "(B, T, 2U)", {b, t, 2 * u});
  a.gates = in.take("saved gates", saved[4], "(B, T, 3D)", {b, t, 3 * d});
  a.is_first = in.flags("is_first", is_first, {b, t});
  a.unimix = (float)unimix;
  a.grad_deter = in.take("grad_deter", grad_deter, "(B, T, D)", {b, t, d});
  a.grad_logits = in.take("grad_logits", grad_logits, "(B, T, S, K)", {b, t, n.groups, n.classes});
  a.grad_stoch = in.take("grad_stoch", grad_stoch, "(B, T, S, K)", {b, t, n.groups, n.classes});

  Tensors out;
  auto fresh = [&](std::initializer_list<int64_t> sizes) {
    out.push_back(allocate(deter, sizes));
    return mutable_ptr(out.back());
  };
  a.carry = fresh({b, d});
  a.d_logits = fresh({b, t, z});
  a.d_inner = fresh({b, t, 2 * u});
  a.d_gates = fresh({b, t, 3 * d});
  a.act_inner = fresh({b, t, 2 * u});
  for (int64_t i = 0; i < hidden; ++i) {
    a.hidden[i] = in.take("saved hidden", saved[5 + i], "(B, T, D)", {b, t, d});
    a.d_hidden[i] = fresh({b, t, d});
    a.act_hidden[i] = fresh({b, t, d});
  }
  for (int64_t i = 0; i < n.post_layers; ++i) {
    a.post[i] = in.take("saved post", saved[5 + hidden + i], "(B, T, U)", {b, t, u});
    a.d_post[i] = fresh({b, t, u});
    a.act_post[i] = fresh({b, t, u});
  }
  a.scales[0] = fresh({b, u});
  a.scales[1] = fresh({b, u});
  for (int64_t i = 0; i < hidden; ++i) a.scales[2 + i] = fresh({b, d});
  for (int64_t i = 0; i < n.post_layers; ++i) a.scales[2 + hidden + i] = fresh({b, u});
  return out;
}

// Weights of a single step in the same order; of a rollout with the prior's layers as the posterior's.
inline RssmScan rollout_args(Inputs& in, const Tensors& weights, int64_t hidden, int64_t groups) {
  RssmScan a{};
  STD_TORCH_CHECK(weights.size() > 6, in.op, ": expected weights, got ", weights.size(),
                  " tensors");
  check_shape(in.op, "stoch_in weight", weights[3], "(U, S*K)", {-1, -1});
  check_shape(in.op, "action_in weight", weights[6], "(U, A)", {-1, -1});
  const int64_t width = weights[3].size(1);
  STD_TORCH_CHECK(groups >= 1 && width >= groups && width % groups == 0, in.op,
                  ": expected S to divide S*K = ", width, ", got ", groups);
  a.size.groups = groups, a.size.classes = width / groups, a.size.time = 1;
  a.size.actions = weights[6].size(1);
  STD_TORCH_CHECK(a.size.actions >= 1, in.op, ": expected A >= 1, got 0");
  a.weights = read_weights(in, weights, hidden, a.size);
  return a;
}

// Step t of a trajectory (N, I+1, width...) whose states are contiguous each; see RssmView.
inline RssmView slice(const char* op, const char* name, Tensor& all, const Tensor& like,
                      int64_t rows, int64_t steps, int64_t width, int64_t t) {
  check_dtype(op, name, all, ScalarType::Float);
  check_same_device(op, name, all, like);
  bool whole = all.numel() == rows * steps * width;
  for (int64_t i = all.dim() - 1, size = 1; i >= 2; size *= all.size(i--)) {
    whole = whole && (all.size(i) == 1 || all.stride(i) == size);
  }
  const int64_t row = all.stride(0), step = all.stride(1);
  whole = whole && (rows <= 1 || row >= width) && (steps <= 1 || step >= width);
  STD_TORCH_CHECK(whole, op, ": expected ", name, " of ", rows * steps, " states of ", width,
                  " adjacent numbers each, got ", all.numel(), " numbers or other strides");
  return {mutable_ptr(all) + t * step, row, step};
}

// One step of a rollout, from state t to state t + 1 of deters (N, I+1, D), stochs (N, I+1, S, K).
// `tokens`: what the posterior's first layer makes of them, its bias inside.
inline RssmScan step_args(Inputs& in, const Tensors& weights, int64_t hidden, Tensor& deters,
                          Tensor& stochs, const Tensor& action, const std::optional<Tensor>& tokens,
                          const std::optional<Tensor>& noise, int64_t t, double unimix) {
  const char* op = in.op;
  check_shape(op, "stochs", stochs, "(N, I+1, S, K)", {-1, -1, -1, -1});
  RssmScan a = rollout_args(in, weights, hidden, stochs.size(2));
  RssmSizes& n = a.size;
  n.batch = stochs.size(0);
  const int64_t steps = stochs.size(1);
  STD_TORCH_CHECK(t >= 0 && t + 1 < steps, op, ": expected 0 <= t < I = ", steps - 1, ", got ", t);
  STD_TORCH_CHECK(stochs.size(3) == n.classes, op, ": expected K = ", n.classes, ", got ",
                  stochs.size(3));
  check_shape(op, "deters", deters, "(N, I+1, D)", {n.batch, steps, n.deter});
  a.action = in.take("action", action, "(N, A)", {n.batch, n.actions});
  if (tokens) a.token_part = in.take("tokens", *tokens, "(N, U)", {n.batch, n.units});
  STD_TORCH_CHECK(tokens || n.embed == 0, op, ": expected the tokens' part of the posterior's first "
                  "layer, or a prior of width D, got neither: ", n.embed, " columns more");
  if (noise) a.noise = in.take("noise", *noise, "(N, S)", {n.batch, n.groups});
  a.unimix = (float)unimix;
  const RssmView deter = slice(op, "deters", deters, in.like, n.batch, steps, n.deter, t);
  const RssmView stoch = slice(op, "stochs", stochs, in.like, n.batch, steps, n.stoch(), t);
  a.deter = deter.data, a.deter_row = deter.row;
  a.stoch = stoch.data, a.stoch_row = stoch.row;
  a.out_deter = {deter.at(0, 1), deter.row, 0};
  a.one_hot = {stoch.at(0, 1), stoch.row, 0};
  return a;
}

// (rows, D) of gru_gates.
inline void check_gates(const char* op, const Tensor& deter, int64_t blocks) {
  check_shape(op, "deter", deter, "(N, D)", {-1, -1});
  STD_TORCH_CHECK(blocks >= 1 && deter.size(1) % blocks == 0, op,
                  ": expected D to be a multiple of the blocks, got D = ", deter.size(1), ", ",
                  blocks, " blocks");
}

}  // namespace fastwm
