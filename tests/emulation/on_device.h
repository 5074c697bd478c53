// Takes the place of csrc/on_device.h: no device, no stream.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "emulation.h"

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, "launch failed: ", emulation::take_error())

namespace fastwm {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace fastwm
