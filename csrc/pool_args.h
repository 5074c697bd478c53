// Shapes of the pool stem, checked alike for CPU and CUDA.
#pragma once

#include <vector>

#include "low.h"

namespace fastwm {

struct PoolShape {
  int64_t images, height, width, channels;
  std::vector<int64_t> pooled() const { return {images, height / 2, width / 2, channels}; }
  int64_t image() const { return height * width * channels; }

  template <class Sizes>
  Sizes as(double eps) const {
    return {height, width, channels, static_cast<float>(eps)};
  }
};

inline void check_pool_vector(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like, int64_t channels) {
  check_rows(op, name, tensor, like, "(C,)", {channels});
}

// Forward: x (N, H, W, C), bias (C,), scale (C,).
inline PoolShape pool_shape(const char* op, const Tensor& x, const Tensor& bias,
                            const Tensor& scale) {
  check_shape(op, "x", x, "(N, H, W, C)", {-1, -1, -1, -1});
  const PoolShape shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  check_pool_vector(op, "bias", bias, x, shape.channels);
  check_pool_vector(op, "scale", scale, x, shape.channels);
  return shape;
}

// Backward: everything as it was pooled from (N, height, width, C).
inline PoolShape pool_shape(const char* op, const Tensor& grad_y, const Tensor& pooled,
                            const Tensor& index, const Tensor& scale, int64_t height,
                            int64_t width) {
  check_shape(op, "pooled", pooled, "(N, H/2, W/2, C)", {-1, -1, -1, -1});
  STD_TORCH_CHECK(height >= 0 && width >= 0, op, ": expected height and width of at least 0, got ",
                  height, " and ", width);
  const PoolShape shape{pooled.size(0), height, width, pooled.size(3)};
  constexpr const char* letters = "(N, H/2, W/2, C)";
  check_rows(op, "pooled", pooled, pooled, letters, shape.pooled(), pooled.scalar_type());
  check_rows(op, "grad_y", grad_y, pooled, letters, shape.pooled(), pooled.scalar_type());
  check_rows(op, "index", index, pooled, letters, shape.pooled(), ScalarType::Byte);
  check_pool_vector(op, "scale", scale, pooled, shape.channels);
  return shape;
}

}  // namespace fastwm
