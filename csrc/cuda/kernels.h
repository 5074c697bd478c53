// The CUDA launchers as the bindings see them. Argument structs are those of the CPU kernels, with
// device pointers; each launcher runs the whole outer index on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/kernels.h"

namespace fastwm::cuda {

cudaError_t lambda_return(const LambdaReturn& a, float* returns, int64_t batch,
                          cudaStream_t stream);
cudaError_t lambda_return_backward(const LambdaReturn& a, float* grad_reward, float* grad_value,
                                   float* grad_discount, int64_t batch, cudaStream_t stream);

}  // namespace fastwm::cuda
