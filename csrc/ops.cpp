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

  // twohot: `second` is a second target on the same logits
  m.def("twohot_loss(Tensor logits, Tensor bins, Tensor target, Tensor? second, float weight, "
        "float second_weight) -> Tensor");
  m.def("twohot_loss_backward(Tensor grad_loss, Tensor logits, Tensor bins, Tensor target, "
        "Tensor? second, float weight, float second_weight) -> Tensor");
  m.def("twohot_mean(Tensor logits, Tensor bins) -> Tensor");
  m.def("twohot_mean_backward(Tensor grad_mean, Tensor logits, Tensor bins) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
