// Argument checks in the house style. The Python functions give the rich messages (ValueError,
// TypeError); these keep whoever calls torch.ops.fastwm.* directly from reading out of bounds.
//
//   lambda_return: expected value of shape (B, T) = (16, 15), got (16, 14)
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

namespace fastwm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string format_sizes(const Sizes& sizes) {
  std::string text = "(";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text += separator + std::to_string(size);
    separator = ", ";
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// Sizes must match exactly; -1 accepts any size. `letters` names them: "(B, T)".
inline void check_shape(const char* op, const char* name, const Tensor& tensor, const char* letters,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool ok = sizes.size() == expected.size();
  size_t dim = 0;
  for (const int64_t size : expected) {
    ok = ok && (size < 0 || sizes[dim] == size);
    ++dim;
  }
  STD_TORCH_CHECK(ok, op, ": expected ", name, " of shape ", letters, " = ", format_sizes(expected),
                  ", got ", format_sizes(sizes));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", name, " of dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), op, ": expected ", name,
                  " on the device of the other arguments; move it there with .to(device)");
}

// Shape, dtype and device at once: the usual float32 argument.
inline void check_float(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        const char* letters, std::initializer_list<int64_t> expected) {
  check_shape(op, name, tensor, letters, expected);
  check_dtype(op, name, tensor, ScalarType::Float);
  check_same_device(op, name, tensor, like);
}

}  // namespace fastwm
