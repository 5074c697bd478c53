// Every operator of the extension, on one screen.
//
// These are raw: no autograd, no broadcasting, float32 unless a comment says otherwise. A forward op
// `x` and its `x_backward` are joined by an autograd.Function in fastwm/ops/<stem>.py, which is what
// people should call. Kernels: csrc/cpu/<stem>.cpp and csrc/cuda/<stem>.cu.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "fwm_schemas.h"  // written by setup.py

static std::string build_info() {
  return "torch " TORCH_VERSION ", compiler " __VERSION__ ", schemas " FWM_SCHEMAS;
}

STABLE_TORCH_LIBRARY(fastwm, m) {
  // What is running.
  m.def("build_info() -> str");
  m.def("cpu_capability() -> str");

  // lambda_return
  m.def("lambda_return(Tensor reward, Tensor value, Tensor discount, Tensor trace) -> Tensor");
  m.def("lambda_return_backward(Tensor grad_returns, Tensor returns, Tensor value, Tensor discount, "
        "Tensor trace) -> (Tensor, Tensor, Tensor)");

  // norm
  m.def("rms_silu(Tensor x, Tensor scale, float eps) -> Tensor");
  m.def("rms_silu_backward(Tensor grad_y, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)");

  // twohot: `second` is a second target on the same logits; the other result is sum exp(logits - max)
  m.def("twohot_loss(Tensor logits, Tensor bins, Tensor target, Tensor? second, float weight, "
        "float second_weight) -> (Tensor, Tensor)");
  m.def("twohot_loss_backward(Tensor grad_loss, Tensor exp_sum, Tensor logits, Tensor bins, "
        "Tensor target, Tensor? second, float weight, float second_weight) -> Tensor");
  m.def("twohot_mean(Tensor logits, Tensor bins) -> Tensor");
  // of logits x W^T + b: their mean, which does not write them; logits and mean; gradients of the
  // loss for x, kernel and bias, which do not write that of the logits; on the CPU only
  m.def("twohot_mean_linear(Tensor x, Tensor weight, Tensor bias, Tensor bins) -> Tensor");
  m.def("twohot_linear(Tensor x, Tensor weight, Tensor bias, Tensor bins) -> (Tensor, Tensor)");
  m.def("twohot_linear_backward(Tensor grad_loss, Tensor exp_sum, Tensor logits, Tensor bins, "
        "Tensor target, Tensor? second, float weight, float second_weight, Tensor x, "
        "Tensor kernel, bool wants_x) -> (Tensor, Tensor, Tensor)");
  m.def("twohot_mean_backward(Tensor grad_mean, Tensor logits, Tensor bins) -> Tensor");

  // gmm: `joint` one mixture (…, M) over vectors (…, M, Z); else one per latent, (…, Z, M) throughout
  m.def("gmm_nll(Tensor target, Tensor mean, Tensor log_std, Tensor logits, bool joint) -> Tensor");
  m.def("gmm_nll_backward(Tensor grad_nll, Tensor target, Tensor mean, Tensor log_std, "
        "Tensor logits, bool joint) -> (Tensor, Tensor, Tensor)");

  // latent: noise (…, S) uniform, (…, S, K) Gumbel, or none; `log`: the gradient of log p, else of p
  m.def("latent_sample(Tensor logits, Tensor? noise, float unimix) -> (Tensor, Tensor)");
  m.def("latent_one_hot(Tensor index, int classes) -> Tensor");
  m.def("latent_backward(Tensor grad, Tensor logits, float unimix, bool log) -> Tensor");
  // dyn, rep, post_entropy, prior_entropy, d rep / d post, d dyn / d prior (empty unless `slopes`)
  m.def("kl_balance(Tensor post, Tensor prior, float unimix, float free_nats, bool slopes) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("kl_balance_backward(Tensor grad_dyn, Tensor grad_rep, Tensor slope_post, "
        "Tensor slope_prior) -> (Tensor, Tensor)");

  // optim: decay holds 0 or 1 per tensor; returns the gradient norm and whether it is finite. Copies
  // written in the same pass: slow[i] follows params[slow_of[i]], low are all params in bfloat16
  m.def("laprop_agc_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mu, Tensor(c!)[] nu, "
        "Tensor(d!) step, Tensor lr, Tensor? grad_scale, float agc, float pmin, float beta1, "
        "float beta2, float eps, float weight_decay, int[] decay, bool nesterov, "
        "Tensor(e!)[] slow, int[] slow_of, float slow_rate, Tensor(f!)[] low) "
        "-> (Tensor, Tensor)");
  m.def("adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mu, Tensor(c!)[] nu, "
        "Tensor(d!) step, Tensor lr, Tensor? grad_scale, float clip_norm, float clip_value, "
        "float beta1, float beta2, float eps, float weight_decay, int[] decay, bool decoupled, "
        "Tensor(e!)[] slow, int[] slow_of, float slow_rate, Tensor(f!)[] low) "
        "-> (Tensor, Tensor)");
  m.def("ema_(Tensor(a!)[] slow, Tensor[] fast, float rate, Tensor? finite) -> ()");
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastwm, m) {
  // gather: windows (B, rows, …) of rings (N, L, …) of any types; `kinds` 0 as stored, else bytes
  // divided by 255 as 1 float32 or 2 bfloat16
  m.def("gather_windows(Tensor[] rings, Tensor ids, int[] offsets, int[] rows, int[] kinds) "
        "-> Tensor[]");

  // image: logits and bytes (N, …) -> (N,); on the CPU only
  m.def("image_loss(Tensor logits, Tensor target) -> Tensor");
  m.def("image_loss_backward(Tensor grad_loss, Tensor logits, Tensor target) -> Tensor");

  // pool: images (N, H, W, C); also what the norm saw, (N, H/2, W/2, C), and where it came from
  m.def("pool_silu(Tensor x, Tensor bias, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("pool_silu_backward(Tensor grad_y, Tensor pooled, Tensor index, Tensor scale, float eps, "
        "int height, int width) -> (Tensor, Tensor, Tensor)");
  // with a 5 x 5 convolution before it, and the gradients of x, weight, bias, scale of k x k; x may
  // be bytes, each byte / 255 - 1/2; on the CPU only
  m.def("pool_conv(Tensor x, Tensor weight, Tensor bias, Tensor scale, float eps) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("pool_conv_backward(Tensor grad_y, Tensor pooled, Tensor index, Tensor scale, float eps, "
        "Tensor x, Tensor weight, bool want_x) -> (Tensor, Tensor, Tensor, Tensor)");

  // upconv: images (N, H, W, C); on the CPU only. The second pair also norms, and gives y before that,
  // empty unless `save`
  m.def("upsample_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("upsample_conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, bool want_x, "
        "bool want_weight) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_conv2d_silu(Tensor x, Tensor weight, Tensor bias, Tensor scale, float eps, "
        "bool save) -> (Tensor, Tensor)");
  m.def("upsample_conv2d_silu_backward(Tensor grad_z, Tensor y, Tensor scale, float eps, Tensor x, "
        "Tensor weight, bool want_x) -> (Tensor, Tensor, Tensor, Tensor)");

  // mlp: layers of (weight, bias, scale), the last one perhaps without scale; on the CPU only
  m.def("mlp_pack(Tensor[] weights) -> Tensor");
  m.def("mlp(Tensor x, Tensor packed, Tensor[] weights, bool squash) -> Tensor");
  // sparse_linear: x (N, in) nearly all zero; packed is the weight (out, in), regrouped
  m.def("sparse_linear_pack(Tensor weight) -> Tensor");
  m.def("sparse_linear(Tensor x, Tensor packed, Tensor bias) -> Tensor");
  m.def("sparse_linear_backward(Tensor grad_y, Tensor x) -> Tensor");  // of the weight

  // rssm: the loop of the posterior sequence; see csrc/rssm_args.h for what the lists hold.
  // `low`: the products in bfloat16, on CUDA only
  m.def("rssm_pack(Tensor[] weights, int hidden, int groups, bool low) -> Tensor");
  m.def("rssm_step_(Tensor packed, Tensor[] weights, int hidden, Tensor(a!) deters, "
        "Tensor(b!) stochs, Tensor action, Tensor? tokens, Tensor? noise, int t, float unimix) "
        "-> ()");
  m.def("gru_gates(Tensor gates, Tensor bias, Tensor deter, int blocks) -> Tensor");
  m.def("rssm_scan(Tensor[] weights, int hidden, Tensor deter, Tensor stoch, Tensor action_part, "
        "Tensor token_part, Tensor is_first, Tensor? noise, float unimix, bool save, bool low) "
        "-> Tensor[]");
  m.def("rssm_scan_backward(Tensor[] weights, int hidden, Tensor[] saved, Tensor deter, "
        "Tensor is_first, float unimix, Tensor grad_deter, Tensor grad_logits, Tensor grad_stoch, "
        "bool low) -> Tensor[]");

  // rssm, the dense GRU of 2023: parts (N, 3D) before the norm; gradients in the arguments' order
  m.def("gru_layernorm(Tensor parts, Tensor scale, Tensor shift, Tensor deter, float eps) "
        "-> Tensor");
  m.def("gru_layernorm_backward(Tensor grad, Tensor parts, Tensor scale, Tensor shift, "
        "Tensor deter, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
