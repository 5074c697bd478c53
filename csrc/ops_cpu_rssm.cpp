// CPU binding of the RSSM sequence: check every tensor, allocate, let a team of threads run.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "cpu/rssm.h"
#include "tensor.h"

namespace fastwm {
namespace {

using Tensors = std::vector<Tensor>;

// A team pays when a phase is worth microseconds: from about this many multiplications a step on.
constexpr int64_t kTeamWork = 1 << 20;

int team_size(const RssmSizes& n) {
  const int64_t d = n.block(), u = n.units;
  const int64_t step = n.deter * (4 * d + 4 * u) + n.stoch() * u;
  const int64_t most = 1 + n.batch * step / kTeamWork;
  return (int)std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

template <class Args>
void run_team(const RssmSizes& n, const Args& args, void (*kernel)(const Args&, Worker)) {
  const int size = team_size(n);
  Team team(size, rssm_phases(n));
  if (size == 1) return kernel(args, Worker(team, 0));
  torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(args, Worker(team, (int)i));
  });
}

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
RssmWeights read_weights(Inputs& in, const Tensors& weights, int64_t hidden, RssmSizes& n) {
  const int64_t count = (int64_t)weights.size(), rest = count - 9 - 3 * hidden - 4;
  STD_TORCH_CHECK(hidden >= 1 && hidden <= kRssmLayers && rest >= 3 && rest % 3 == 0 &&
                      rest / 3 <= kRssmLayers,
                  in.op, ": expected weights of 3 + ", hidden, " + 1..", kRssmLayers,
                  " layers of three tensors and 2 of two, got ", count, " tensors");
  check_shape(in.op, "deter_in weight", weights[0], "(U, D)", {-1, -1});
  const size_t gru = 9 + 3 * hidden;
  check_shape(in.op, "gru weight", weights[gru], "(G, D/G, 3D/G)", {-1, -1, -1});
  check_shape(in.op, "post weight", weights[gru + 2], "(U, D+E)", {-1, -1});
  n.units = weights[0].size(0), n.deter = weights[0].size(1), n.blocks = weights[gru].size(0);
  n.hidden_layers = hidden, n.post_layers = rest / 3;
  n.embed = weights[gru + 2].size(1) - n.deter;
  STD_TORCH_CHECK(n.units > 0 && n.deter > 0 && n.blocks > 0 && n.deter % n.blocks == 0 &&
                      n.embed >= 0,
                  in.op, ": expected D a multiple of G and a posterior of width D+E, got D = ",
                  n.deter, ", G = ", n.blocks, ", width ", n.deter + n.embed);
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

RssmSizes read_sizes(const char* op, int64_t groups, int64_t classes, const Tensor& is_first) {
  check_shape(op, "is_first", is_first, "(B, T)", {-1, -1});
  RssmSizes n{};
  n.batch = is_first.size(0), n.time = is_first.size(1);
  n.groups = groups, n.classes = classes;
  STD_TORCH_CHECK(n.groups >= 1 && n.classes >= 1, op, ": expected S and K >= 1, got ", n.groups,
                  " and ", n.classes);
  return n;
}

// With `save` every step is kept and returned; without, one step's memory serves them all.
Tensor keep(const Tensor& like, const RssmSizes& n, int64_t width, bool save, RssmView& view) {
  Tensor tensor = allocate(like, {n.batch, save ? n.time : 1, width});
  view.data = mutable_ptr(tensor);
  view.row = save ? n.time * width : width;
  view.step = save ? width : 0;
  return tensor;
}

// -> deter, logits, index and, with save, inner, gates, hidden..., post...
Tensors rssm_scan_cpu(Tensors weights, int64_t hidden, Tensor deter, Tensor stoch,
                      Tensor action_part, Tensor token_part, Tensor is_first,
                      std::optional<Tensor> noise, double unimix, bool save) {
  constexpr const char* op = "rssm_scan";
  RssmScan a{};
  check_shape(op, "stoch", stoch, "(B, S, K)", {-1, -1, -1});
  a.size = read_sizes(op, stoch.size(1), stoch.size(2), is_first);
  Inputs in{op, deter, {}};
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
  Tensor index = allocate(deter, {n.batch, n.time, n.groups},
                          small ? ScalarType::Byte : ScalarType::Long);
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
  Tensor workspace = allocate(deter, {rssm_packed_floats(n) + rssm_scan_workspace(n)});
  a.packed = mutable_ptr(workspace);
  a.workspace = a.packed + rssm_packed_floats(n);
  if (n.batch > 0 && n.time > 0) run_team(n, a, rssm_scan);
  if (!save) out.resize(3);
  return out;
}

// saved: what rssm_scan returned. -> carry (B, D), d_logits, d_inner, d_gates, act_inner,
// then of every hidden layer d, act, of every posterior layer d, act, then the scales' gradients.
Tensors rssm_scan_backward_cpu(Tensors weights, int64_t hidden, Tensors saved, Tensor deter,
                               Tensor is_first, double unimix, Tensor grad_deter,
                               Tensor grad_logits, Tensor grad_stoch) {
  constexpr const char* op = "rssm_scan_backward";
  RssmScanGrad a{};
  check_shape(op, "grad_stoch", grad_stoch, "(B, T, S, K)", {-1, -1, -1, -1});
  a.size = read_sizes(op, grad_stoch.size(2), grad_stoch.size(3), is_first);
  Inputs in{op, deter, {}};
  a.weights = read_weights(in, weights, hidden, a.size);
  const RssmSizes& n = a.size;
  const int64_t b = n.batch, t = n.time, u = n.units, d = n.deter, z = n.stoch();
  STD_TORCH_CHECK((int64_t)saved.size() == 5 + n.hidden_layers + n.post_layers, op,
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
  Tensor workspace = allocate(deter, {rssm_scan_grad_workspace(n)});
  a.workspace = mutable_ptr(workspace);
  if (b > 0 && t > 0) run_team(n, a, rssm_scan_backward);
  return out;
}

// Weights of a rollout in the same order, with the prior's layers as the posterior's.
RssmScan rollout_args(Inputs& in, const Tensors& weights, int64_t hidden, int64_t groups) {
  RssmScan a{};
  STD_TORCH_CHECK(weights.size() > 6, in.op, ": expected weights, got ", weights.size(), " tensors");
  check_shape(in.op, "stoch_in weight", weights[3], "(U, S*K)", {-1, -1});
  check_shape(in.op, "action_in weight", weights[6], "(U, A)", {-1, -1});
  const int64_t width = weights[3].size(1);
  STD_TORCH_CHECK(groups >= 1 && width >= groups && width % groups == 0, in.op,
                  ": expected S to divide S*K = ", width, ", got ", groups);
  a.size.groups = groups, a.size.classes = width / groups, a.size.time = 1;
  a.size.actions = weights[6].size(1);
  STD_TORCH_CHECK(a.size.actions >= 1, in.op, ": expected A >= 1, got 0");
  a.weights = read_weights(in, weights, hidden, a.size);
  STD_TORCH_CHECK(a.size.embed == 0, in.op, ": expected a prior of width D, got ", a.size.embed,
                  " more");
  return a;
}

Tensor rssm_pack_cpu(Tensors weights, int64_t hidden, int64_t groups) {
  STD_TORCH_CHECK(!weights.empty(), "rssm_pack: expected weights, got none");
  Inputs in{"rssm_pack", weights[0], {}};
  RssmScan a = rollout_args(in, weights, hidden, groups);
  // Zeros in the gaps between panels, so that equal weights give equal tensors.
  Tensor packed = torch::stable::new_zeros(weights[0], {rssm_packed_floats(a.size)});
  a.packed = mutable_ptr(packed);
  run_team(a.size, a, rssm_pack);
  return packed;
}

// Step t of a trajectory (N, I+1, width...) whose states are contiguous each; see RssmView.
RssmView slice(const char* op, const char* name, Tensor& all, const Tensor& like, int64_t rows,
               int64_t steps, int64_t width, int64_t t) {
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

// Writes state t + 1 of deters (N, I+1, D) and stochs (N, I+1, S, K) from state t.
void rssm_step_cpu(Tensor packed, Tensors weights, int64_t hidden, Tensor deters, Tensor stochs,
                   Tensor action, std::optional<Tensor> noise, int64_t t, double unimix) {
  constexpr const char* op = "rssm_step_";
  check_shape(op, "stochs", stochs, "(N, I+1, S, K)", {-1, -1, -1, -1});
  Inputs in{op, packed, {}};
  RssmScan a = rollout_args(in, weights, hidden, stochs.size(2));
  RssmSizes& n = a.size;
  n.batch = stochs.size(0);
  const int64_t steps = stochs.size(1);
  STD_TORCH_CHECK(t >= 0 && t + 1 < steps, op, ": expected 0 <= t < I = ", steps - 1, ", got ", t);
  STD_TORCH_CHECK(stochs.size(3) == n.classes, op, ": expected K = ", n.classes, ", got ",
                  stochs.size(3));
  check_shape(op, "deters", deters, "(N, I+1, D)", {n.batch, steps, n.deter});
  in.take("packed", packed, "(floats)", {rssm_packed_floats(n)});
  a.packed = const_cast<float*>(ptr(in.kept.back()));  // read only
  a.action = in.take("action", action, "(N, A)", {n.batch, n.actions});
  if (noise) a.noise = in.take("noise", *noise, "(N, S)", {n.batch, n.groups});
  a.unimix = (float)unimix;
  const RssmView deter = slice(op, "deters", deters, packed, n.batch, steps, n.deter, t);
  const RssmView stoch = slice(op, "stochs", stochs, packed, n.batch, steps, n.stoch(), t);
  a.deter = deter.data, a.deter_row = deter.row;
  a.stoch = stoch.data, a.stoch_row = stoch.row;
  a.out_deter = {deter.at(0, 1), deter.row, 0};
  a.one_hot = {stoch.at(0, 1), stoch.row, 0};
  RssmSizes group = n;
  group.batch = kRssmGroup;
  a.scratch = rssm_scan_workspace(group);
  a.workspace_step = a.scratch + rssm_step_preactivations(n);
  Tensor workspace = allocate(packed, {team_size(n) * a.workspace_step});
  a.workspace = mutable_ptr(workspace);
  if (n.batch > 0) run_team(n, a, rssm_step);
}

Tensor gru_gates_cpu(Tensor gates, Tensor bias, Tensor deter, int64_t blocks) {
  constexpr const char* op = "gru_gates";
  check_shape(op, "deter", deter, "(N, D)", {-1, -1});
  const int64_t rows = deter.size(0), width = deter.size(1);
  STD_TORCH_CHECK(blocks >= 1 && width % blocks == 0, op,
                  ": expected D to be a multiple of the blocks, got D = ", width, ", ", blocks,
                  " blocks");
  const Tensor g = float_arg(op, "gates", gates, deter, "(N, 3D)", {rows, 3 * width});
  const Tensor b = float_arg(op, "bias", bias, deter, "(3D)", {3 * width});
  const Tensor h = float_arg(op, "deter", deter, deter, "(N, D)", {rows, width});
  Tensor out = allocate(deter, {rows, width});
  const GruGates args{ptr(g), ptr(b), ptr(h), mutable_ptr(out), width, blocks};
  parallel(rows, 8 * width, [&](int64_t begin, int64_t end) { gru_gates(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("rssm_pack", TORCH_BOX(&fastwm::rssm_pack_cpu));
  m.impl("rssm_step_", TORCH_BOX(&fastwm::rssm_step_cpu));
  m.impl("gru_gates", TORCH_BOX(&fastwm::gru_gates_cpu));
  m.impl("rssm_scan", TORCH_BOX(&fastwm::rssm_scan_cpu));
  m.impl("rssm_scan_backward", TORCH_BOX(&fastwm::rssm_scan_backward_cpu));
}
