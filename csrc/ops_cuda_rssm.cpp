// CUDA binding of the RSSM sequence and of its single steps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <string>

#include "on_device.h"
#include "rssm_args.h"
#include "rssm_library.h"
#include "rssm_library_backward.h"
#include "rssm_library_step.h"
#include "rssm_phases_backward.h"

namespace fastwm {
namespace {

// Calls f(T{}) with the type of the products.
template <class F>
void with_products(bool low, const F& f) {
  if (low) {
    f(Bf16{});
  } else {
    f(float{});
  }
}

// FASTWM_RSSM: "gemm" for the library's products, "phase" for the kernels that hold them.
bool wants_phases() {
  const char* value = std::getenv("FASTWM_RSSM");
  const std::string mode = value == nullptr ? "gemm" : value;
  STD_TORCH_CHECK(mode == "gemm" || mode == "phase",
                  "FASTWM_RSSM: expected gemm or phase, got ", mode);
  return mode == "phase";
}

Tensors rssm_scan_cuda(Tensors weights, int64_t hidden, Tensor deter, Tensor stoch,
                       Tensor action_part, Tensor token_part, Tensor is_first,
                       std::optional<Tensor> noise, double unimix, bool save, bool low) {
  const OnDeviceOf device(deter);
  RssmScan a{};
  Inputs in{"rssm_scan", deter, {}};
  Tensors out = scan_args(a, in, weights, hidden, deter, stoch, action_part, token_part, is_first,
                          noise, unimix, save);
  if (a.size.batch > 0 && a.size.time > 0) {
    with_products(low, [&](auto type) {
      using T = decltype(type);
      if (wants_phases()) {
        PhaseForward<T>(a, deter, device.stream()).run();
      } else {
        LibraryForward<T>(a, deter, device.stream()).run();
      }
    });
  }
  if (!save) out.resize(3);
  return out;
}

Tensors rssm_scan_backward_cuda(Tensors weights, int64_t hidden, Tensors saved, Tensor deter,
                                Tensor is_first, double unimix, Tensor grad_deter,
                                Tensor grad_logits, Tensor grad_stoch, bool low) {
  const OnDeviceOf device(deter);
  RssmScanGrad a{};
  Inputs in{"rssm_scan_backward", deter, {}};
  Tensors out = scan_backward_args(a, in, weights, hidden, saved, deter, is_first, unimix,
                                   grad_deter, grad_logits, grad_stoch);
  if (a.size.batch > 0 && a.size.time > 0) {
    with_products(low, [&](auto type) {
      using T = decltype(type);
      if (wants_phases()) {
        PhaseBackward<T>(a, deter, device.stream()).run();
      } else {
        LibraryBackward<T>(a, deter, device.stream()).run();
      }
    });
  }
  return out;
}

Tensor rssm_pack_cuda(Tensors weights, int64_t hidden, int64_t groups, bool low) {
  STD_TORCH_CHECK(!weights.empty(), "rssm_pack: expected weights, got none");
  const OnDeviceOf device(weights[0]);
  Inputs in{"rssm_pack", weights[0], {}};
  const RssmScan a = rollout_args(in, weights, hidden, groups);
  Tensor packed = allocate(weights[0], {PackedStep(a.size).total},
                           low ? ScalarType::BFloat16 : ScalarType::Float);
  with_products(low, [&](auto type) {
    using T = decltype(type);
    Products<T> memory(weights[0]);
    pack_step(a, memory, static_cast<T*>(packed.data_ptr()));
  });
  return packed;
}

// Writes state t + 1 of deters (N, I+1, D) and stochs (N, I+1, S, K) from state t.
void rssm_step_cuda(Tensor packed, Tensors weights, int64_t hidden, Tensor deters, Tensor stochs,
                    Tensor action, std::optional<Tensor> tokens, std::optional<Tensor> noise,
                    int64_t t, double unimix) {
  constexpr const char* op = "rssm_step_";
  STD_TORCH_CHECK(!tokens, op, ": expected no tokens on CUDA, where rssm_scan of T = 1 takes them");
  const OnDeviceOf device(packed);
  Inputs in{op, packed, {}};
  const RssmScan a = step_args(in, weights, hidden, deters, stochs, action, tokens, noise, t,
                               unimix);
  const bool low = packed.scalar_type() == ScalarType::BFloat16;
  check_shape(op, "packed", packed, "(numbers)", {PackedStep(a.size).total});
  if (!low) check_dtype(op, "packed", packed, ScalarType::Float);
  if (a.size.batch == 0) return;
  const Tensor row_major = dense(packed);
  with_products(low, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(row_major.data_ptr());
    LibraryStep<T>(a, from, deters, device.stream()).run();
  });
}

Tensor gru_gates_cuda(Tensor gates, Tensor bias, Tensor deter, int64_t blocks) {
  constexpr const char* op = "gru_gates";
  check_gates(op, deter, blocks);
  const OnDeviceOf device(deter);
  const int64_t rows = deter.size(0), width = deter.size(1);
  const Tensor g = float_arg(op, "gates", gates, deter, "(N, 3D)", {rows, 3 * width});
  const Tensor b = float_arg(op, "bias", bias, deter, "(3D)", {3 * width});
  const Tensor h = float_arg(op, "deter", deter, deter, "(N, D)", {rows, width});
  Tensor out = allocate(deter, {rows, width});
  if (rows == 0 || width == 0) return out;
  const cuda::RssmGates<float> args{rows, width, blocks, {ptr(g), 3 * width / blocks, 3 * width},
                                    ptr(b), {}, {ptr(h), width}, {}, {mutable_ptr(out), width},
                                    nullptr};
  FWM_LAUNCH(rssm_gates(args, device.stream()));
  return out;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CUDA, m) {
  m.impl("rssm_pack", TORCH_BOX(&fastwm::rssm_pack_cuda));
  m.impl("rssm_step_", TORCH_BOX(&fastwm::rssm_step_cuda));
  m.impl("gru_gates", TORCH_BOX(&fastwm::gru_gates_cuda));
  m.impl("rssm_scan", TORCH_BOX(&fastwm::rssm_scan_cuda));
  m.impl("rssm_scan_backward", TORCH_BOX(&fastwm::rssm_scan_backward_cuda));
}
