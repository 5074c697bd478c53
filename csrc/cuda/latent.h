// Categorical latents on the GPU: the arguments of cpu/latent.h, all groups or rows at once.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/latent.h"

namespace fastwm::cuda {

// Index is uint8_t or int64_t.
template <class Index>
cudaError_t latent_sample(const LatentSample& a, Index* index, float* log_probs, int64_t groups,
                          cudaStream_t stream);
template <class Index>
cudaError_t one_hot(const Index* index, float* out, int64_t classes, int64_t groups,
                    cudaStream_t stream);
cudaError_t latent_backward(const LatentBackward& a, float* grad_logits, int64_t groups,
                            cudaStream_t stream);
cudaError_t kl_balance(const KlBalance& a, const KlOutputs& out, int64_t rows, cudaStream_t stream);
cudaError_t scale_rows(const float* factor, const float* x, float* out, int64_t columns,
                       int64_t rows, cudaStream_t stream);

}  // namespace fastwm::cuda
