// Ops on the last one or two dimensions take tensors of any leading shape (…).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "tensor.h"

namespace fastwm {

// Sizes without the last `dropped` dimensions.
inline std::vector<int64_t> leading(const Tensor& tensor, int64_t dropped) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end() - dropped};
}

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return leading(tensor, 0); }

// Shape, dtype and device at once, for an argument of any leading shape.
inline void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       const char* letters, const std::vector<int64_t>& sizes,
                       ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes, op, ": expected ", name, " of shape ", letters, " = ",
                  format_sizes(sizes), ", got ", format_sizes(tensor.sizes()));
  check_dtype(op, name, tensor, dtype);
  check_same_device(op, name, tensor, like);
}

// The same, row-major.
inline Tensor rows_arg(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                       const char* letters, const std::vector<int64_t>& sizes,
                       ScalarType dtype = ScalarType::Float) {
  check_rows(op, name, tensor, like, letters, sizes, dtype);
  return dense(tensor);
}

inline void check_min_dim(const char* op, const char* name, const Tensor& tensor,
                          const char* letters, int64_t dims) {
  STD_TORCH_CHECK(tensor.dim() >= dims, op, ": expected ", name, " of shape ", letters, ", got ",
                  format_sizes(tensor.sizes()));
}

}  // namespace fastwm
