// CPU bindings of the image stem; see ops_cpu.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu/image.h"
#include "rows.h"

namespace fastwm {
namespace {

// logits and target (N, …), alike.
ImageLoss image_args(const char* op, const Tensor& logits, const Tensor& target) {
  check_min_dim(op, "logits", logits, "(N, ...)", 1);
  check_rows(op, "logits", logits, logits, "(N, ...)", sizes_of(logits));
  check_rows(op, "target", target, logits, "(N, ...)", sizes_of(logits), ScalarType::Byte);
  std::vector<int64_t> image = sizes_of(logits);
  image.erase(image.begin());
  return {nullptr, nullptr, nullptr, product(image)};
}

Tensor image_loss_cpu(Tensor logits, Tensor target) {
  ImageLoss args = image_args("image_loss", logits, target);
  const Tensor x = dense(logits), bytes = dense(target);
  args.logits = ptr(x);
  args.target = ptr<uint8_t>(bytes);
  Tensor loss = allocate(logits, {logits.size(0)});
  float* out = mutable_ptr(loss);
  parallel(logits.size(0), 4 * args.numbers,
           [&](int64_t begin, int64_t end) { image_loss(args, out, begin, end); });
  return loss;
}

Tensor image_loss_backward_cpu(Tensor grad_loss, Tensor logits, Tensor target) {
  constexpr const char* op = "image_loss_backward";
  ImageLoss args = image_args(op, logits, target);
  const Tensor grad = float_arg(op, "grad_loss", grad_loss, logits, "(N,)", {logits.size(0)});
  const Tensor x = dense(logits), bytes = dense(target);
  args.logits = ptr(x);
  args.target = ptr<uint8_t>(bytes);
  args.grad = ptr(grad);
  Tensor grad_logits = allocate(logits, sizes_of(logits));
  float* out = mutable_ptr(grad_logits);
  parallel(logits.size(0), 4 * args.numbers,
           [&](int64_t begin, int64_t end) { image_loss_backward(args, out, begin, end); });
  return grad_logits;
}

}  // namespace
}  // namespace fastwm

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("image_loss", TORCH_BOX(&fastwm::image_loss_cpu));
  m.impl("image_loss_backward", TORCH_BOX(&fastwm::image_loss_backward_cpu));
}
