// Mixtures of normal distributions: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

namespace fastwm {

constexpr int64_t kMaxComponents = 64;  // the kernels keep a mixture on the stack

// Parameters are read row by row, so that slices of a larger projection need no copy.
struct GmmParams {
  const float* data;
  int64_t stride;  // from row to row, in numbers
};

struct GmmNll {
  const float* target;  // (N, Z)
  GmmParams mean, log_std, logits;
  const float* grad_nll;  // backward: as many as results
  int64_t latents;        // Z
  int64_t components;     // M
};
struct GmmGrads {
  float *mean, *log_std, *logits;  // row-major
};

// One mixture per row: mean, log_std (N, M, Z), logits (N, M) -> nll (N)
void gmm_joint_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end);
void gmm_joint_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end);

// One mixture per latent: mean, log_std, logits (N, Z, M) -> nll (N, Z)
void gmm_factored_nll(const GmmNll& a, float* nll, int64_t begin, int64_t end);
void gmm_factored_backward(const GmmNll& a, const GmmGrads& out, int64_t begin, int64_t end);

}  // namespace fastwm
