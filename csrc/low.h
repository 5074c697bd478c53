// Arguments of type float32 or bfloat16.
#pragma once

#include "bf16.h"
#include "rows.h"

namespace fastwm {

// Calls f(T{}) with T = float or Bf16, the type of the tensor's elements.
template <class F>
void with_type(const char* op, const char* name, const Tensor& tensor, const F& f) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": expected ",
                  name, " of dtype Float or BFloat16, got ", torch::headeronly::toString(type));
  if (type == ScalarType::Float) {
    f(float{});
  } else {
    f(Bf16{});
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastwm
