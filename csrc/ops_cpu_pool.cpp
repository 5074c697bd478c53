// CPU bindings of the pool stem; see ops_cpu.cpp. Images lie channels-last: (N, H, W, C).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/pool.h"
#include "pool_args.h"
#include "ranges.h"

namespace fastwm {
namespace {

std::tuple<Tensor, Tensor, Tensor> pool_silu_cpu(Tensor x, Tensor bias, Tensor scale, double eps) {
  constexpr const char* op = "pool_silu";
  const PoolShape shape = pool_shape(op, x, bias, scale);
  const Tensor input = rows_arg(op, "x", x, x, "(N, H, W, C)", sizes_of(x));
  const Tensor offset = dense(bias), gain = dense(scale);

  Tensor y = allocate(x, shape.pooled()), pooled = allocate(x, shape.pooled());
  Tensor index = allocate(x, shape.pooled(), ScalarType::Byte);
  const PoolSilu args{ptr(input), ptr(offset), ptr(gain), shape.as<PoolSizes>(eps)};
  float *out = mutable_ptr(y), *found = mutable_ptr(pooled);
  uint8_t* from = mutable_ptr<uint8_t>(index);
  parallel(shape.images, 4 * shape.image(),
           [&](int64_t begin, int64_t end) { pool_silu(args, out, found, from, begin, end); });
  return {y, pooled, index};
}

// Images (N, H, W, C), row-major: numbers or bytes.
Tensor images_arg(const char* op, const Tensor& x, const Tensor& like, const PoolShape& shape,
                  int64_t inputs) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Byte, op,
                  ": expected x of dtype Float or Byte, got ", torch::headeronly::toString(type));
  return rows_arg(op, "x", x, like, "(N, H, W, C)",
                  {shape.images, shape.height, shape.width, inputs}, type);
}

template <class Args>
void set_images(Args& args, const Tensor& x) {
  const bool bytes = x.scalar_type() == ScalarType::Byte;
  args.x = bytes ? nullptr : ptr(x);
  args.bytes = bytes ? ptr<uint8_t>(x) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> pool_conv_cpu(Tensor x, Tensor weight, Tensor bias, Tensor scale,
                                                 double eps) {
  constexpr const char* op = "pool_conv";
  check_shape(op, "x", x, "(N, H, W, C)", {-1, -1, -1, -1});
  check_shape(op, "weight", weight, "(C', C, 5, 5)", {-1, x.size(3), 5, 5});
  const PoolShape shape{x.size(0), x.size(1), x.size(2), weight.size(0)};
  const Tensor input = images_arg(op, x, weight, shape, x.size(3));
  const Tensor filter =
      float_arg(op, "weight", weight, weight, "(C', C, 5, 5)", {-1, x.size(3), 5, 5});
  check_pool_vector(op, "bias", bias, weight, shape.channels);
  check_pool_vector(op, "scale", scale, weight, shape.channels);
  const Tensor offset = dense(bias), gain = dense(scale);

  Tensor y = allocate(filter, shape.pooled()), pooled = allocate(filter, shape.pooled());
  Tensor index = allocate(filter, shape.pooled(), ScalarType::Byte);
  if (product(shape.pooled()) == 0) return {y, pooled, index};
  PoolStage args{
      nullptr, nullptr, nullptr, ptr(offset), ptr(gain), x.size(3), shape.as<PoolSizes>(eps)};
  set_images(args, input);
  Tensor packed = allocate(filter, {args.packed()});
  pool_stage_pack(args, ptr(filter), mutable_ptr(packed));
  args.weight = ptr(packed);
  const PoolStagePlan plan = pool_stage_plan(args);
  const int64_t groups = (shape.images + plan.images - 1) / plan.images;
  const Ranges ranges(groups);
  Tensor scratch = allocate(filter, {ranges.count, plan.scratch});
  const PoolStageResults to{mutable_ptr(y), mutable_ptr(pooled), mutable_ptr<uint8_t>(index)};
  float* memory = mutable_ptr(scratch);
  ranges.run(groups, 25 * args.inputs * shape.image() * plan.images,
             [&](int64_t i, int64_t begin, int64_t end) {
               pool_stage(args, memory + i * plan.scratch, to, begin * plan.images,
                          std::min(shape.images, end * plan.images));
             });
  return {y, pooled, index};
}

std::tuple<Tensor, Tensor, Tensor> pool_silu_backward_cpu(Tensor grad_y, Tensor pooled,
                                                          Tensor index, Tensor scale, double eps,
                                                          int64_t height, int64_t width) {
  constexpr const char* op = "pool_silu_backward";
  const PoolShape shape = pool_shape(op, grad_y, pooled, index, scale, height, width);
  const Tensor grad = dense(grad_y), found = dense(pooled), from = dense(index);
  const Tensor gain = dense(scale);
  check_float(op, "pooled", pooled, pooled, "(N, H/2, W/2, C)", {-1, -1, -1, -1});

  const int64_t channels = shape.channels;
  const Ranges ranges(shape.images);
  Tensor grad_x = allocate(pooled, {shape.images, height, width, channels});
  Tensor sums = allocate(gain, {ranges.count, 2, channels});
  Tensor scratch = allocate(gain, {ranges.count, width / 2 * channels});
  Tensor grad_bias = allocate(gain, {channels}), grad_scale = allocate(gain, {channels});
  const PoolSiluGrad args{ptr(grad), ptr(found), ptr<uint8_t>(from), ptr(gain),
                          shape.as<PoolSizes>(eps)};
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums), *rows = mutable_ptr(scratch);
  ranges.run(shape.images, 8 * shape.image(), [&](int64_t i, int64_t begin, int64_t end) {
    pool_silu_backward(args, rows + i * (width / 2) * channels, out, parts + 2 * i * channels,
                       begin, end);
  });
  const float* sum = total(parts, ranges, 2 * channels);
  std::copy(sum, sum + channels, mutable_ptr(grad_bias));
  std::copy(sum + channels, sum + 2 * channels, mutable_ptr(grad_scale));
  return {grad_x, grad_bias, grad_scale};
}

// sum (C', k, taps) -> (C', C, k, k)
void unpack_weight_grad(const PoolConv& a, const float* sum, float* to) {
  for (int64_t o = 0; o < a.pool.n.channels; ++o) {
    for (int64_t c = 0; c < a.inputs; ++c) {
      for (int64_t tap = 0; tap < a.kernel * a.kernel; ++tap) {
        const int64_t row = tap / a.kernel, column = tap % a.kernel;
        *to++ = sum[(o * a.kernel + row) * a.taps() + column * a.inputs + c];
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_conv_backward_cpu(Tensor grad_y, Tensor pooled,
                                                                  Tensor index, Tensor scale,
                                                                  double eps, Tensor x,
                                                                  Tensor weight, bool want_x) {
  constexpr const char* op = "pool_conv_backward";
  check_shape(op, "x", x, "(N, H, W, C)", {-1, -1, -1, -1});
  const int64_t height = x.size(1), width = x.size(2), inputs = x.size(3);
  const PoolShape shape = pool_shape(op, grad_y, pooled, index, scale, height, width);
  check_float(op, "pooled", pooled, pooled, "(N, H/2, W/2, C')", {-1, -1, -1, -1});
  const int64_t channels = shape.channels, kernel = weight.dim() == 4 ? weight.size(3) : 0;
  STD_TORCH_CHECK(kernel % 2 == 1, op, ": expected weight of shape (C', C, k, k) with odd k, got ",
                  format_sizes(weight.sizes()));
  STD_TORCH_CHECK(height + kernel < 32768 && width + kernel < 32768, op,
                  ": expected images of fewer than 32768 rows and columns, got ", height, " x ",
                  width);
  const Tensor filter =
      float_arg(op, "weight", weight, pooled, "(C', C, k, k)", {channels, inputs, kernel, kernel});
  const Tensor input = images_arg(op, x, pooled, shape, inputs);
  STD_TORCH_CHECK(!want_x || input.scalar_type() == ScalarType::Float, op,
                  ": expected x of dtype Float where its gradient is wanted, got Byte");
  const Tensor grad = dense(grad_y), found = dense(pooled), from = dense(index);
  const Tensor gain = dense(scale);

  PoolConv args{{ptr(grad), ptr(found), ptr<uint8_t>(from), ptr(gain), shape.as<PoolSizes>(eps)},
                nullptr,
                nullptr,
                nullptr,
                inputs,
                kernel};
  set_images(args, input);
  Tensor packed = allocate(filter, {want_x ? args.packed() : 0});
  if (want_x) {
    pool_conv_pack(args, ptr(filter), mutable_ptr(packed));
    args.weight = ptr(packed);
  }
  const Ranges ranges(shape.images);
  const int64_t size = args.sums() + 2 * channels, room = args.scratch();
  Tensor grad_x = want_x ? allocate(x, sizes_of(x)) : allocate(filter, {0});
  Tensor sums = allocate(filter, {ranges.count, size});
  Tensor scratch = allocate(filter, {ranges.count, room});
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums), *memory = mutable_ptr(scratch);
  ranges.run(shape.images, kernel * kernel * inputs * shape.image(),
             [&](int64_t i, int64_t begin, int64_t end) {
               pool_conv_backward(args, memory + i * room, out, parts + i * size, begin, end);
             });
  const float* sum = total(parts, ranges, size);
  Tensor grad_weight = allocate(filter, {channels, inputs, kernel, kernel});
  Tensor grad_bias = allocate(gain, {channels}), grad_scale = allocate(gain, {channels});
  unpack_weight_grad(args, sum, mutable_ptr(grad_weight));
  sum += args.sums();
  std::copy(sum, sum + channels, mutable_ptr(grad_bias));
  std::copy(sum + channels, sum + 2 * channels, mutable_ptr(grad_scale));
  return {grad_x, grad_weight, grad_bias, grad_scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("pool_silu", TORCH_BOX(&fastwm::pool_silu_cpu));
  m.impl("pool_silu_backward", TORCH_BOX(&fastwm::pool_silu_backward_cpu));
  m.impl("pool_conv", TORCH_BOX(&fastwm::pool_conv_cpu));
  m.impl("pool_conv_backward", TORCH_BOX(&fastwm::pool_conv_backward_cpu));
}
