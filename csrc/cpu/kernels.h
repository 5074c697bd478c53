// The CPU kernels as the bindings see them: plain pointers and sizes, no torch. Each works on the
// half-open range [begin, end) of its outer index, so that the caller decides about threads.
#pragma once

#include <stdint.h>

namespace fastwm {

const char* cpu_capability();

// lambda_return: everything (batch, length) row-major, except returns: (batch, length - 1).
struct LambdaReturn {
  const float* reward;
  const float* value;
  const float* discount;
  const float* trace;
  const float* returns;       // backward: what the forward pass computed
  const float* grad_returns;  // backward
  int64_t length;
};
void lambda_return(const LambdaReturn& a, float* returns, int64_t begin, int64_t end);
void lambda_return_backward(const LambdaReturn& a, float* grad_reward, float* grad_value,
                            float* grad_discount, int64_t begin, int64_t end);

}  // namespace fastwm
