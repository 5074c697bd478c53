// The squared error of an image given as logits: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

namespace fastwm {

struct ImageLoss {
  const float* logits;    // (N, P)
  const uint8_t* target;  // (N, P)
  const float* grad;      // (N), backward
  int64_t numbers;        // P
};
void image_loss(const ImageLoss& a, float* loss, int64_t begin, int64_t end);
void image_loss_backward(const ImageLoss& a, float* grad_logits, int64_t begin, int64_t end);

}  // namespace fastwm
