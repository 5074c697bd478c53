// CPU bindings of the upconv stem; see ops_cpu.cpp. Images lie channels-last: (N, H, W, C).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/upconv.h"
#include "ranges.h"

namespace fastwm {
namespace {

UpconvSizes upconv_sizes(const char* op, const Tensor& x, const Tensor& weight) {
  check_shape(op, "x", x, "(N, H, W, C)", {-1, -1, -1, -1});
  const UpconvSizes n{x.size(1), x.size(2), x.size(3), weight.dim() == 4 ? weight.size(0) : 0};
  STD_TORCH_CHECK(n.height > 0 && n.width > 0 && n.inputs > 0 && n.outputs > 0, op,
                  ": expected at least one row, column and channel, got x ",
                  format_sizes(x.sizes()), " and weight ", format_sizes(weight.sizes()));
  check_float(op, "weight", weight, x, "(C', C, 5, 5)", {n.outputs, n.inputs, 5, 5});
  check_dtype(op, "x", x, ScalarType::Float);
  return n;
}

// Multiplications of an image, for who decides about threads.
int64_t cost(const UpconvSizes& n) {
  return n.down() * n.across() * kFrequencies * n.inputs * 4 * n.outputs;
}

// Images whose sums are kept apart from others: enough for the kernel's products to fill registers,
// and so many that all sums together stay below 256 MB.
Ranges ranges_of(const UpconvSizes& n, int64_t images) {
  constexpr int64_t kMost = int64_t{1} << 26;
  const int64_t fill = (n.rows() + n.down() - 1) / n.down();
  return Ranges(images, std::max(fill, images * n.sums() / kMost + 1));
}

Tensor upsample_conv2d_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* op = "upsample_conv2d";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const Tensor images = dense(x), kernel = dense(weight);
  const Tensor offset = bias ? float_arg(op, "bias", *bias, x, "(C',)", {n.outputs}) : weight;

  Tensor y = allocate(x, {x.size(0), 2 * n.height, 2 * n.width, n.outputs});
  Tensor packed = allocate(x, {n.packed()});
  upconv_pack(n, ptr(kernel), bias ? ptr(offset) : nullptr, mutable_ptr(packed));
  const Upconv args{ptr(images), ptr(packed), n};
  float* out = mutable_ptr(y);
  const int64_t room = n.scratch();
  parallel(x.size(0), cost(n), [&](int64_t begin, int64_t end) {
    Tensor scratch = allocate(x, {room});
    upconv(args, mutable_ptr(scratch), out, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> upsample_conv2d_backward_cpu(Tensor grad_y, Tensor x,
                                                                Tensor weight, bool want_x,
                                                                bool want_weight) {
  constexpr const char* op = "upsample_conv2d_backward";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const int64_t images = x.size(0);
  const Tensor grad = float_arg(op, "grad_y", grad_y, x, "(N, 2H, 2W, C')",
                                {images, 2 * n.height, 2 * n.width, n.outputs});
  const Tensor input = dense(x), kernel = dense(weight);

  Tensor turned = allocate(x, {want_x ? n.turned() : 0});
  if (want_x) upconv_turn(n, ptr(kernel), mutable_ptr(turned));
  const UpconvGrad args{ptr(grad), ptr(input), want_x ? ptr(turned) : nullptr, want_weight, n};
  const Ranges ranges = ranges_of(n, images);
  const int64_t size = want_weight ? n.sums() : 0, room = n.scratch();
  Tensor grad_x = want_x ? allocate(x, {images, n.height, n.width, n.inputs}) : allocate(x, {0});
  Tensor sums = allocate(x, {ranges.count, size}), scratch = allocate(x, {ranges.count, room});
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums), *memory = mutable_ptr(scratch);
  ranges.run(images, 2 * cost(n), [&](int64_t i, int64_t begin, int64_t end) {
    upconv_backward(args, memory + i * room, out, parts + i * size, begin, end);
  });
  if (!want_weight) return {grad_x, allocate(x, {0}), allocate(x, {0})};
  Tensor grad_weight = allocate(x, {n.outputs, n.inputs, 5, 5});
  Tensor grad_bias = allocate(x, {n.outputs});
  upconv_fold(n, total(parts, ranges, size), mutable_ptr(grad_weight), mutable_ptr(grad_bias));
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&fastwm::upsample_conv2d_cpu));
  m.impl("upsample_conv2d_backward", TORCH_BOX(&fastwm::upsample_conv2d_backward_cpu));
}
