// sum (sigmoid(logits) - target / 255)^2 over an image, and its gradient: each in one pass.
#ifndef FWM_ISA
#include "cpu/image.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/image.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void image_loss(const ImageLoss& a, float* loss, int64_t begin, int64_t end) {
  FWM_CALL(image_loss)(a, loss, begin, end);
}

void image_loss_backward(const ImageLoss& a, float* grad_logits, int64_t begin, int64_t end) {
  FWM_CALL(image_loss_backward)(a, grad_logits, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

// So many squares are added up before they join the sum: thousands of small ones keep their digits.
constexpr int64_t kPart = 512;

void image_loss(const ImageLoss& a, float* loss, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    const float* x = a.logits + image * a.numbers;
    const uint8_t* target = a.target + image * a.numbers;
    float total = 0.0f;
    for (int64_t first = 0; first < a.numbers; first += kPart) {
      const int64_t last = first + kPart < a.numbers ? first + kPart : a.numbers;
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int64_t i = first; i < last; ++i) {
        const float error = sigmoid(x[i]) - unit_byte(target[i]);
        part += error * error;
      }
      total += part;
    }
    loss[image] = total;
  }
}

void image_loss_backward(const ImageLoss& a, float* grad_logits, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    const float* x = a.logits + image * a.numbers;
    const uint8_t* target = a.target + image * a.numbers;
    float* out = grad_logits + image * a.numbers;
    const float grad = 2.0f * a.grad[image];
#pragma omp simd
    for (int64_t i = 0; i < a.numbers; ++i) {
      const float s = sigmoid(x[i]);
      out[i] = grad * (s - unit_byte(target[i])) * s * (1.0f - s);
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
