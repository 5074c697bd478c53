// CPU binding of the RSSM sequence: check every tensor, allocate, let a team of threads run.
#include "rssm_args.h"

namespace fastwm {
namespace {

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

void refuse_low(const char* op, bool low) {
  STD_TORCH_CHECK(!low, op, ": expected low = false on the CPU: products here are float32");
}

Tensors rssm_scan_cpu(Tensors weights, int64_t hidden, Tensor deter, Tensor stoch,
                      Tensor action_part, Tensor token_part, Tensor is_first,
                      std::optional<Tensor> noise, double unimix, bool save, bool low) {
  refuse_low("rssm_scan", low);
  RssmScan a{};
  Inputs in{"rssm_scan", deter, {}};
  Tensors out = scan_args(a, in, weights, hidden, deter, stoch, action_part, token_part, is_first,
                          noise, unimix, save);
  const RssmSizes& n = a.size;
  Tensor workspace = allocate(deter, {rssm_packed_floats(n) + rssm_scan_workspace(n)});
  a.packed = mutable_ptr(workspace);
  a.workspace = a.packed + rssm_packed_floats(n);
  if (n.batch > 0 && n.time > 0) run_team(n, a, rssm_scan);
  if (!save) out.resize(3);
  return out;
}

Tensors rssm_scan_backward_cpu(Tensors weights, int64_t hidden, Tensors saved, Tensor deter,
                               Tensor is_first, double unimix, Tensor grad_deter,
                               Tensor grad_logits, Tensor grad_stoch, bool low) {
  refuse_low("rssm_scan_backward", low);
  RssmScanGrad a{};
  Inputs in{"rssm_scan_backward", deter, {}};
  Tensors out = scan_backward_args(a, in, weights, hidden, saved, deter, is_first, unimix,
                                   grad_deter, grad_logits, grad_stoch);
  const RssmSizes& n = a.size;
  Tensor workspace = allocate(deter, {rssm_scan_grad_workspace(n)});
  a.workspace = mutable_ptr(workspace);
  if (n.batch > 0 && n.time > 0) run_team(n, a, rssm_scan_backward);
  return out;
}

Tensor rssm_pack_cpu(Tensors weights, int64_t hidden, int64_t groups, bool low) {
  refuse_low("rssm_pack", low);
  STD_TORCH_CHECK(!weights.empty(), "rssm_pack: expected weights, got none");
  Inputs in{"rssm_pack", weights[0], {}};
  RssmScan a = rollout_args(in, weights, hidden, groups);
  // Zeros in the gaps between panels, so that equal weights give equal tensors.
  Tensor packed = torch::stable::new_zeros(weights[0], {rssm_packed_floats(a.size)});
  a.packed = mutable_ptr(packed);
  run_team(a.size, a, rssm_pack);
  return packed;
}

// Writes state t + 1 of deters (N, I+1, D) and stochs (N, I+1, S, K) from state t.
void rssm_step_cpu(Tensor packed, Tensors weights, int64_t hidden, Tensor deters, Tensor stochs,
                   Tensor action, std::optional<Tensor> tokens, std::optional<Tensor> noise,
                   int64_t t, double unimix) {
  Inputs in{"rssm_step_", packed, {}};
  RssmScan a = step_args(in, weights, hidden, deters, stochs, action, tokens, noise, t, unimix);
  const RssmSizes& n = a.size;
  in.take("packed", packed, "(floats)", {rssm_packed_floats(n)});
  a.packed = const_cast<float*>(ptr(in.kept.back()));  // read only
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
  check_gates(op, deter, blocks);
  const int64_t rows = deter.size(0), width = deter.size(1);
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
