// What every CPU binding needs beside the schema: arguments, memory, threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "check.h"

namespace fastwm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised memory of the given sizes on the device of `like`, dtype of `like` or another.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The same values, row-major.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A checked, row-major float32 argument.
inline Tensor float_arg(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                        const char* letters, std::initializer_list<int64_t> expected) {
  check_float(op, name, tensor, like, letters, expected);
  return dense(tensor);
}

template <class T = float>
const T* ptr(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <class T = float>
T* mutable_ptr(Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

// Runs f(begin, end) over [0, rows) on libtorch's own threads. `cost` is the work of one row in
// elements: below about 16k elements a thread costs more to wake than it saves.
template <class F>
void parallel(int64_t rows, int64_t cost, const F& f) {
  constexpr int64_t kGrain = 16384;
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  if (rows <= grain) {
    f(int64_t{0}, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, f);
  }
}

}  // namespace fastwm
