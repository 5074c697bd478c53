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

// Into y, z or both, where they are not empty.
void forward(const UpconvSizes& n, const Tensor& x, const Tensor& weight, const float* bias,
             const UpconvNorm& norm, Tensor& y, Tensor& z) {
  const Tensor images = dense(x), kernel = dense(weight);
  Tensor packed = allocate(x, {n.packed()});
  upconv_pack(n, ptr(kernel), bias, mutable_ptr(packed));
  const Upconv args{ptr(images), ptr(packed), norm, n};
  float* before = y.dim() == 4 ? mutable_ptr(y) : nullptr;
  float* after = norm.scale ? mutable_ptr(z) : nullptr;
  const int64_t room = n.scratch();
  parallel(x.size(0), cost(n), [&](int64_t begin, int64_t end) {
    Tensor scratch = allocate(x, {room});
    upconv(args, mutable_ptr(scratch), before, after, begin, end);
  });
}

Tensor upsample_conv2d_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* op = "upsample_conv2d";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const Tensor offset = bias ? float_arg(op, "bias", *bias, x, "(C',)", {n.outputs}) : weight;
  Tensor y = allocate(x, {x.size(0), 2 * n.height, 2 * n.width, n.outputs});
  forward(n, x, weight, bias ? ptr(offset) : nullptr, {nullptr, 0.0f}, y, y);
  return y;
}

std::tuple<Tensor, Tensor> upsample_conv2d_silu_cpu(Tensor x, Tensor weight, Tensor bias,
                                                    Tensor scale, double eps, bool save) {
  constexpr const char* op = "upsample_conv2d_silu";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const Tensor offset = float_arg(op, "bias", bias, x, "(C',)", {n.outputs});
  const Tensor gain = float_arg(op, "scale", scale, x, "(C',)", {n.outputs});
  Tensor z = allocate(x, {x.size(0), 2 * n.height, 2 * n.width, n.outputs});
  Tensor y =
      save ? allocate(x, {x.size(0), 2 * n.height, 2 * n.width, n.outputs}) : allocate(x, {0});
  forward(n, x, weight, ptr(offset), {ptr(gain), static_cast<float>(eps)}, y, z);
  return {z, y};
}

struct Gradients {
  Tensor x, weight, bias, scale;
};

// `args` without what is made here: the turned kernel.
Gradients backward(UpconvGrad args, int64_t images, const Tensor& weight, bool want_x) {
  const UpconvSizes& n = args.n;
  const Tensor kernel = dense(weight);
  Tensor turned = allocate(weight, {want_x ? n.turned() : 0});
  if (want_x) {
    upconv_turn(n, ptr(kernel), mutable_ptr(turned));
    args.turned = ptr(turned);
  }
  const Ranges ranges = ranges_of(n, images);
  const bool sums_wanted = args.want_weight || args.y;
  const int64_t size = sums_wanted ? n.sums() : 0, room = n.scratch();
  Tensor grad_x =
      want_x ? allocate(weight, {images, n.height, n.width, n.inputs}) : allocate(weight, {0});
  Tensor sums = allocate(weight, {ranges.count, size});
  Tensor scratch = allocate(weight, {ranges.count, room});
  float *out = mutable_ptr(grad_x), *parts = mutable_ptr(sums), *memory = mutable_ptr(scratch);
  ranges.run(images, 2 * cost(n), [&](int64_t i, int64_t begin, int64_t end) {
    upconv_backward(args, memory + i * room, out, parts + i * size, begin, end);
  });
  if (!sums_wanted) return {grad_x, allocate(weight, {0}), allocate(weight, {0}), grad_x};
  const float* sum = total(parts, ranges, size);
  Tensor grad_weight = allocate(weight, {n.outputs, n.inputs, 5, 5});
  Tensor grad_bias = allocate(weight, {n.outputs}), grad_scale = allocate(weight, {n.outputs});
  upconv_fold(n, sum, mutable_ptr(grad_weight), mutable_ptr(grad_bias));
  std::copy(sum + n.packed(), sum + n.sums(), mutable_ptr(grad_scale));
  return {grad_x, grad_weight, grad_bias, grad_scale};
}

std::tuple<Tensor, Tensor, Tensor> upsample_conv2d_backward_cpu(Tensor grad_y, Tensor x,
                                                                Tensor weight, bool want_x,
                                                                bool want_weight) {
  constexpr const char* op = "upsample_conv2d_backward";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const Tensor grad = float_arg(op, "grad_y", grad_y, x, "(N, 2H, 2W, C')",
                                {x.size(0), 2 * n.height, 2 * n.width, n.outputs});
  const Tensor input = dense(x);
  const UpconvGrad args{ptr(grad), nullptr, ptr(input), nullptr, want_weight, {nullptr, 0.0f}, n};
  const Gradients grads = backward(args, x.size(0), weight, want_x);
  return {grads.x, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_conv2d_silu_backward_cpu(
    Tensor grad_z, Tensor y, Tensor scale, double eps, Tensor x, Tensor weight, bool want_x) {
  constexpr const char* op = "upsample_conv2d_silu_backward";
  const UpconvSizes n = upconv_sizes(op, x, weight);
  const std::initializer_list<int64_t> large{x.size(0), 2 * n.height, 2 * n.width, n.outputs};
  const Tensor grad = float_arg(op, "grad_z", grad_z, x, "(N, 2H, 2W, C')", large);
  const Tensor before = float_arg(op, "y", y, x, "(N, 2H, 2W, C')", large);
  const Tensor gain = float_arg(op, "scale", scale, x, "(C',)", {n.outputs});
  const Tensor input = dense(x);
  const UpconvNorm norm{ptr(gain), static_cast<float>(eps)};
  const UpconvGrad args{ptr(grad), ptr(before), ptr(input), nullptr, true, norm, n};
  const Gradients grads = backward(args, x.size(0), weight, want_x);
  return {grads.x, grads.weight, grads.bias, grads.scale};
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("upsample_conv2d", TORCH_BOX(&fastwm::upsample_conv2d_cpu));
  m.impl("upsample_conv2d_backward", TORCH_BOX(&fastwm::upsample_conv2d_backward_cpu));
  m.impl("upsample_conv2d_silu", TORCH_BOX(&fastwm::upsample_conv2d_silu_cpu));
  m.impl("upsample_conv2d_silu_backward", TORCH_BOX(&fastwm::upsample_conv2d_silu_backward_cpu));
}
