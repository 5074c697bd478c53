// Arguments of the dense GRU step of 2023, checked the same way for both devices.
#pragma once

#include "cpu/rssm_layernorm.h"
#include "rows.h"

namespace fastwm {

// Owns the row-major copies that the kernel's pointers refer to.
struct GruLayerNormCall {
  Tensor parts, scale, shift, deter;
  int64_t rows, width;

  GruLayerNormCall(const char* op, const Tensor& parts_, const Tensor& scale_, const Tensor& shift_,
                   const Tensor& deter_)
      : parts(parts_), scale(scale_), shift(shift_), deter(deter_) {
    check_shape(op, "deter", deter, "(N, D)", {-1, -1});
    rows = deter.size(0), width = deter.size(1);
    deter = float_arg(op, "deter", deter, deter_, "(N, D)", {rows, width});
    parts = float_arg(op, "parts", parts, deter_, "(N, 3D)", {rows, 3 * width});
    scale = float_arg(op, "scale", scale, deter_, "(3D,)", {3 * width});
    shift = float_arg(op, "shift", shift, deter_, "(3D,)", {3 * width});
  }

  GruLayerNorm kernel(const float* grad, double eps) const {
    return {ptr(parts), ptr(scale), ptr(shift), ptr(deter), grad, width, static_cast<float>(eps)};
  }
};

}  // namespace fastwm
