// Two-hot distributions on the GPU: the structs of cpu/twohot.h with logits of type float or Bf16.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "bf16.h"

namespace fastwm::cuda {

template <class T>
struct TwohotLoss {
  const T* logits;         // (N, V)
  const float* bins;       // (V)
  const float* target[2];  // (N) each; the second may be null
  float weight[2];
  const float* grad_loss;  // (N), backward
  const float* exp_sum;    // (N), backward: what the forward pass computed
  int64_t count;           // V
};
template <class T>
cudaError_t twohot_loss(const TwohotLoss<T>& a, float* loss, float* exp_sum, int64_t rows,
                        cudaStream_t stream);
template <class T>
cudaError_t twohot_loss_backward(const TwohotLoss<T>& a, T* grad_logits, int64_t rows,
                                 cudaStream_t stream);

template <class T>
struct TwohotMean {
  const T* logits;         // (N, V)
  const float* bins;       // (V), antisymmetric
  const float* grad_mean;  // (N), backward
  int64_t count;           // V
};
template <class T>
cudaError_t twohot_mean(const TwohotMean<T>& a, float* mean, int64_t rows, cudaStream_t stream);
template <class T>
cudaError_t twohot_mean_backward(const TwohotMean<T>& a, T* grad_logits, int64_t rows,
                                 cudaStream_t stream);

}  // namespace fastwm::cuda
