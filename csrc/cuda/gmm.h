// Mixtures of normal distributions on the GPU: the arguments of cpu/gmm.h, all rows at once.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/gmm.h"

namespace fastwm::cuda {

cudaError_t gmm_joint_nll(const GmmNll& a, float* nll, int64_t rows, cudaStream_t stream);
cudaError_t gmm_joint_backward(const GmmNll& a, const GmmGrads& out, int64_t rows,
                               cudaStream_t stream);
cudaError_t gmm_factored_nll(const GmmNll& a, float* nll, int64_t rows, cudaStream_t stream);
cudaError_t gmm_factored_backward(const GmmNll& a, const GmmGrads& out, int64_t rows,
                                  cudaStream_t stream);

}  // namespace fastwm::cuda
