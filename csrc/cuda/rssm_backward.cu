// The posterior sequence, backward: what happens between the products of a step. Rows own what they
// add to, so there are no atomics and two runs give the same bits.
#include "cuda/rows.cuh"
#include "cuda/rssm.h"

namespace fastwm::cuda {
namespace {

// One warp a group: d_logits = grad_logits + (1 - unimix) p (g - sum p g).
template <class T>
__global__ void __launch_bounds__(kThreads) sample_grad_kernel(RssmSampleGrad<T> a) {
  const int64_t warps = kThreads / 32, groups = a.rows * a.groups;
  const int lane = threadIdx.x % 32;
  for (int64_t item = blockIdx.x * warps + threadIdx.x / 32; item < groups;
       item += gridDim.x * warps) {
    const int64_t b = item / a.groups, first = item % a.groups * a.classes;
    const float *logits = a.logits.data + b * a.logits.row + first;
    const float* given = a.grad_stoch.data + b * a.grad_stoch.row + first;
    const T* carried = a.carried == nullptr ? nullptr : a.carried + item * a.classes;
    auto grad = [&](int64_t k) { return given[k] + (carried ? widen(carried[k]) : 0.0f); };
    float top = -INFINITY, total = 0.0f, dot = 0.0f;
    for (int64_t k = lane; k < a.classes; k += 32) top = fmaxf(top, logits[k]);
    top = warp_max(top);
    for (int64_t k = lane; k < a.classes; k += 32) {
      const float e = expf(logits[k] - top);
      total += e;
      dot += e * grad(k);
    }
    total = warp_sum(total);
    dot = warp_sum(dot) / total;
    const float scale = (1.0f - a.unimix) / total;
    for (int64_t k = lane; k < a.classes; k += 32) {
      const int64_t column = first + k;
      const float out = a.grad_logits.data[b * a.grad_logits.row + column] +
                        scale * expf(logits[k] - top) * (grad(k) - dot);
      a.d_logits.data[b * a.d_logits.row + column] = out;
      narrow(out, a.operand[item * a.classes + k]);
    }
  }
}

// Through silu(rms(pre) * scale) for one row; grad(i) is read once per element, d may hold it.
template <class Grad>
__device__ void norm_grad_row(const Grad& grad, const float* pre, const float* scale, int64_t n,
                              float* d, float* act, float* scales) {
  float squares = 0.0f, mean = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) squares += pre[i] * pre[i];
  const float root = inverse_rms(squares, n);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float normed = pre[i] * root, z = normed * scale[i];
    const float dz = grad(i) * silu_grad(z);
    act[i] = silu(z);
    scales[i] += dz * normed;
    d[i] = dz * scale[i];
    mean += dz * scale[i] * normed;
  }
  mean = block_sum(mean) / (float)n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) d[i] = root * (d[i] - pre[i] * root * mean);
}

template <class T>
__global__ void __launch_bounds__(kThreads) norm_grad_kernel(RssmNormGrad<T> a) {
  const int64_t b = blockIdx.x, n = a.blocks * a.width;
  auto grad = [&](int64_t i) {
    return widen(a.grad.data[i / a.width * a.grad.block + b * a.grad.row + i % a.width]);
  };
  float* d = a.d_pre.data + b * a.d_pre.row;
  norm_grad_row(grad, a.pre.data + b * a.pre.row, a.scale, n, d, a.act.data + b * a.act.row,
                a.scales.data + b * a.scales.row);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    T* to = a.operand.data + i / a.width * a.operand.block + b * a.operand.row + i % a.width;
    narrow(d[i], *to);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gates_grad_kernel(RssmGatesGrad<T> a) {
  const int64_t d = a.deter / a.blocks;
  FWM_GRID_STRIDE(item, a.rows * a.deter) {
    const int64_t b = item / a.deter, j = item % a.deter, g = j / d, k = j % d;
    float* carry = a.carry.data + b * a.carry.row + j;
    const float grad = *carry + widen(a.product[item]) + a.grad.data[b * a.grad.row + j];
    const float before = a.first.data[b * a.first.row] ? 0.0f : a.state.data[b * a.state.row + j];
    const int64_t column = 3 * g * d + k;
    const float* raw = a.gates.data + b * a.gates.row + column;
    const GruGateGrad out = gru_gate_backward(grad, raw[0], raw[d], raw[2 * d], before);
    *carry = out.deter;
    const float parts[3] = {out.reset, out.cand, out.update};
    float* saved = a.d_gates.data + b * a.d_gates.row + column;
    T* operand = a.operand.data + g * a.operand.block + b * a.operand.row + k;
    for (int i = 0; i < 3; ++i) {
      saved[i * d] = parts[i];
      narrow(parts[i], operand[i * d]);
    }
  }
}

template <class T>
__device__ void branch_grad(const RssmInputsGrad<T>& a, int64_t b, int64_t branch,
                            const float* scale, const Rows& scales, const Grouped<T>& to,
                            bool first) {
  const int64_t u = a.units, skip = a.deter / a.blocks + branch * u;
  auto grad = [&](int64_t i) {
    float sum = 0.0f;
    for (int64_t g = 0; g < a.blocks; ++g) {
      sum += widen(a.grad.data[g * a.grad.block + b * a.grad.row + skip + i]);
    }
    return sum;
  };
  float* d = a.d_inner.data + b * a.d_inner.row + branch * u;
  norm_grad_row(grad, a.inner.data + b * a.inner.row + branch * u, scale, u, d,
                a.act.data + b * a.act.row + branch * u, scales.data + b * scales.row);
  for (int64_t i = threadIdx.x; i < u; i += blockDim.x) {
    narrow(first ? 0.0f : d[i], to.data[b * to.row + i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) inputs_grad_kernel(RssmInputsGrad<T> a) {
  const int64_t b = blockIdx.x, width = a.deter / a.blocks;
  const bool first = a.first.data[b * a.first.row];
  branch_grad(a, b, 0, a.deter_scale, a.deter_scales, a.to_deter, first);
  branch_grad(a, b, 1, a.stoch_scale, a.stoch_scales, a.to_stoch, first);
  float* carry = a.carry.data + b * a.carry.row;
  for (int64_t j = threadIdx.x; j < a.deter; j += blockDim.x) {
    const int64_t at = j / width * a.grad.block + b * a.grad.row + j % width;
    carry[j] = first ? 0.0f : carry[j] + widen(a.grad.data[at]);
  }
}

}  // namespace

template <class T>
cudaError_t rssm_sample_backward(const RssmSampleGrad<T>& a, cudaStream_t stream) {
  sample_grad_kernel<T><<<blocks_for(a.rows * a.groups * 32), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t rssm_norm_backward(const RssmNormGrad<T>& a, cudaStream_t stream) {
  norm_grad_kernel<T><<<(unsigned)a.rows, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t rssm_gates_backward(const RssmGatesGrad<T>& a, cudaStream_t stream) {
  gates_grad_kernel<T><<<blocks_for(a.rows * a.deter), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t rssm_inputs_backward(const RssmInputsGrad<T>& a, cudaStream_t stream) {
  inputs_grad_kernel<T><<<(unsigned)a.rows, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

#define FWM_INSTANCES(T)                                                          \
  template cudaError_t rssm_sample_backward(const RssmSampleGrad<T>&, cudaStream_t); \
  template cudaError_t rssm_norm_backward(const RssmNormGrad<T>&, cudaStream_t);     \
  template cudaError_t rssm_gates_backward(const RssmGatesGrad<T>&, cudaStream_t);   \
  template cudaError_t rssm_inputs_backward(const RssmInputsGrad<T>&, cudaStream_t);
FWM_INSTANCES(float)
FWM_INSTANCES(Bf16)

}  // namespace fastwm::cuda
