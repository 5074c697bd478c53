// Two-hot distributions: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

namespace fastwm {

struct TwohotLoss {
  const float* logits;     // (N, V)
  const float* bins;       // (V)
  const float* target[2];  // (N) each; the second may be null
  float weight[2];
  const float* grad_loss;  // (N), backward
  const float* exp_sum;    // (N), backward: what the forward pass computed
  int64_t count;           // V
};
void twohot_loss(const TwohotLoss& a, float* loss, float* exp_sum, int64_t begin, int64_t end);
void twohot_loss_backward(const TwohotLoss& a, float* grad_logits, int64_t begin, int64_t end);

struct TwohotMean {
  const float* logits;     // (N, V)
  const float* bins;       // (V), antisymmetric
  const float* grad_mean;  // (N), backward
  int64_t count;           // V
};
void twohot_mean(const TwohotMean& a, float* mean, int64_t begin, int64_t end);
void twohot_mean_backward(const TwohotMean& a, float* grad_logits, int64_t begin, int64_t end);

// The head's own product, logits = x W^T + b: a few rows at a time, in cache with what follows.
struct TwohotLinear {
  const float *x, *weight, *bias;  // (N, U), (V, U), (V)
  const float* bins;               // (V), antisymmetric
  int64_t inputs, count;           // U, V
  float* packed;                   // twohot_linear_packed_floats, filled by twohot_linear_pack
};
constexpr int64_t kMostRows = 96;  // that pass together
int64_t twohot_linear_packed_floats(int64_t count, int64_t inputs);
void twohot_linear_pack(const TwohotLinear& a);
// The mean of every row, and its logits if they are wanted.
void twohot_linear(const TwohotLinear& a, float* logits, float* mean, int64_t begin, int64_t end);

// The backward pass of loss and product at once: the gradient of the logits is never written.
struct TwohotLinearGrad {
  TwohotLoss loss;
  const float *x, *weight;  // (N, U), (V, U)
  int64_t inputs;           // U
  float* packed;            // twohot_linear_packed_floats(inputs, count): the weight, by input
};
int64_t twohot_linear_workspace(const TwohotLinearGrad& a);
void twohot_linear_grad_pack(const TwohotLinearGrad& a);
// Adds the rows' part to grad_weight (V, U) and grad_bias (V); grad_x may be null.
void twohot_linear_backward(const TwohotLinearGrad& a, float* workspace, float* grad_x,
                            float* grad_weight, float* grad_bias, int64_t begin, int64_t end);

}  // namespace fastwm
