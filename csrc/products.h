// Products of the library into memory that stays: set up once, run every step, nothing allocated.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <deque>
#include <initializer_list>

#include "bf16.h"
#include "tensor.h"

namespace fastwm {

template <class T>
constexpr ScalarType kScalarType = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<Bf16> = ScalarType::BFloat16;

// Operands and results of type T on one device; owns what it allocates.
template <class T>
class Products {
 public:
  explicit Products(const Tensor& like) : like_(like) {}

  T* take(int64_t count) { return static_cast<T*>(keep(count, kScalarType<T>).data_ptr()); }
  float* take_floats(int64_t count) {
    return static_cast<float*>(keep(count, ScalarType::Float).data_ptr());
  }
  int32_t* take_ints(int64_t count) {
    return static_cast<int32_t*>(keep(count, ScalarType::Int).data_ptr());
  }

  using Sizes = std::initializer_list<int64_t>;

  template <class X>
  Tensor view(const X* data, Sizes sizes, Sizes strides) const {
    return torch::stable::from_blob(const_cast<X*>(data), {sizes.begin(), sizes.size()},
                                    {strides.begin(), strides.size()}, like_.device(),
                                    kScalarType<X>);
  }
  // Row-major (rows, columns), and its transpose.
  Tensor matrix(const T* data, int64_t rows, int64_t columns) const {
    return view(data, {rows, columns}, {columns, 1});
  }
  Tensor transposed(const T* data, int64_t rows, int64_t columns) const {
    return view(data, {columns, rows}, {1, columns});
  }
  // (blocks, rows, columns) with any row length.
  Tensor blocks(const T* data, int64_t count, int64_t rows, int64_t columns, int64_t block,
                int64_t row) const {
    return view(data, {count, rows, columns}, {block, row, 1});
  }
  Tensor blocks_transposed(const T* data, int64_t count, int64_t rows, int64_t columns,
                           int64_t block, int64_t row) const {
    return view(data, {count, columns, rows}, {block, 1, row});
  }

  // `count` numbers from a float32 view to type T.
  void copy(T* to, Sizes sizes, Sizes strides, const Tensor& from) const {
    Tensor target = view(to, sizes, strides);
    torch::stable::copy_(target, from);
  }
  // A row-major weight as an operand: itself, or rounded once.
  const T* operand(const float* weight, int64_t count) {
    if constexpr (kScalarType<T> == ScalarType::Float) {
      return weight;
    } else {
      T* rounded = take(count);
      copy(rounded, {count}, {1}, view(weight, {count}, {1}));
      return rounded;
    }
  }

 private:
  Tensor& keep(int64_t count, ScalarType dtype) {
    kept_.push_back(allocate(like_, {count}, dtype));
    return kept_.back();
  }

  const Tensor like_;
  std::deque<Tensor> kept_;
};

// out = a b, of matrices or of one matrix per block.
struct Product {
  Tensor out, a, b;

  void run() const {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(a.dim() == 3 ? "aten::bmm" : "aten::mm", "out",
                                                 stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor: let its handle go
  }
};

}  // namespace fastwm
