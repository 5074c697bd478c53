// Lambda-return: one thread per row, serial over time. Rows are (batch, length) row-major, so the
// loads of a warp are `length` floats apart, and the caches serve the following steps of each row;
// at the batch sizes of imagination (1024 rows and up) the chain of dependent steps is the bound.
// Outputs are overwritten. float32 throughout.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "scalars.h"

namespace fastwm::cuda {
namespace {

__global__ void lambda_return_kernel(LambdaReturn a, float* __restrict__ returns, int64_t batch) {
  FWM_GRID_STRIDE(row, batch) {
    const int64_t in = row * a.length, out = row * (a.length - 1);
    float next = a.value[in + a.length - 1];
    for (int64_t t = a.length - 1; t > 0; --t) {
      next =
          lambda_step(a.reward[in + t], a.discount[in + t], a.trace[in + t], a.value[in + t], next);
      returns[out + t - 1] = next;
    }
  }
}

__global__ void lambda_return_backward_kernel(LambdaReturn a, float* __restrict__ grad_reward,
                                              float* __restrict__ grad_value,
                                              float* __restrict__ grad_discount, int64_t batch) {
  FWM_GRID_STRIDE(row, batch) {
    const int64_t in = row * a.length, out = row * (a.length - 1);
    grad_reward[in] = grad_value[in] = grad_discount[in] = 0.0f;
    float carry = 0.0f;
    for (int64_t t = 1; t < a.length; ++t) {
      const bool is_final = t == a.length - 1;
      const float value = a.value[in + t], discount = a.discount[in + t];
      const float next = is_final ? value : a.returns[out + t];
      const float trace = is_final ? 0.0f : a.trace[in + t];
      const float grad = a.grad_returns[out + t - 1] + carry;
      grad_reward[in + t] = grad;
      grad_discount[in + t] = grad * lambda_bootstrap(trace, value, next);
      grad_value[in + t] = grad * discount * (1.0f - trace);
      carry = grad * discount * trace;
    }
  }
}

}  // namespace

cudaError_t lambda_return(const LambdaReturn& a, float* returns, int64_t batch,
                          cudaStream_t stream) {
  lambda_return_kernel<<<blocks_for(batch), kThreads, 0, stream>>>(a, returns, batch);
  return cudaGetLastError();
}

cudaError_t lambda_return_backward(const LambdaReturn& a, float* grad_reward, float* grad_value,
                                   float* grad_discount, int64_t batch, cudaStream_t stream) {
  lambda_return_backward_kernel<<<blocks_for(batch), kThreads, 0, stream>>>(
      a, grad_reward, grad_value, grad_discount, batch);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
