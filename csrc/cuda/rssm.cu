// The posterior sequence, forward: what happens between the products of a step. A row's threads
// write their own elements of a pre-activation and read the same ones back, so no shared memory is
// sized by the model.
#include "cuda/rssm.h"

#include "cuda/rows.cuh"

namespace fastwm::cuda {
namespace {

// The class where the cumulative mass passes the noise, as on the CPU: in order, one thread a group.
__device__ int32_t draw(float* e, int64_t classes, float unimix, float noise) {
  float total = 0.0f;
  for (int64_t k = 0; k < classes; ++k) total += e[k];
  const float scale = (1.0f - unimix) / total, floor = unimix / (float)classes;
  float mass = 0.0f;
  for (int64_t k = 0; k < classes; ++k) e[k] = mass += e[k] * scale + floor;
  const float threshold = noise * mass;
  int32_t chosen = 0;
  for (int64_t k = 0; k + 1 < classes; ++k) chosen += e[k] <= threshold;
  return chosen;
}

__device__ int32_t largest(const float* x, int64_t n) {
  int32_t best = 0;
  for (int64_t k = 1; k < n; ++k) best = x[k] > x[best] ? (int32_t)k : best;
  return best;
}

template <class T>
__device__ void sample_row(const RssmSample<T>& a, int64_t b) {
  const int64_t width = a.groups * a.classes, stride = a.classes | 1;  // odd: no bank conflicts
  float *logits = a.logits.data + b * a.logits.row, *e = a.scratch + b * a.groups * stride;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float value = widen(a.product[b * width + i]) + a.bias[i];
    logits[i] = value;
    e[i / a.classes * stride + i % a.classes] = value;
  }
  __syncthreads();
  for (int64_t s = threadIdx.x; s < a.groups; s += blockDim.x) {
    float* mass = e + s * stride;
    const int32_t top = largest(mass, a.classes);
    int32_t chosen = top;
    if (a.noise.data != nullptr) {
      const float most = mass[top];
      for (int64_t k = 0; k < a.classes; ++k) mass[k] = expf(mass[k] - most);
      chosen = draw(mass, a.classes, a.unimix, a.noise.data[b * a.noise.row + s]);
    }
    a.index[b * a.groups + s] = chosen;
    if (a.index8 != nullptr) a.index8[b * a.index_row + s] = (uint8_t)chosen;
    if (a.index64 != nullptr) a.index64[b * a.index_row + s] = chosen;
  }
  __syncthreads();
  if (a.one_hot.data == nullptr) return;
  float* hot = a.one_hot.data + b * a.one_hot.row;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    hot[i] = a.index[b * a.groups + i / a.classes] == i % a.classes ? 1.0f : 0.0f;
  }
}

template <class T>
__device__ float stoch_branch(const RssmInputs<T>& a, int64_t b, int64_t i) {
  if (a.from_stoch != nullptr) return widen(a.from_stoch[b * a.units + i]);
  float sum = 0.0f;
  for (int64_t s = 0; s < a.groups; ++s) {
    const int64_t chosen = s * a.classes + a.index[b * a.groups + s];
    sum += widen(a.stoch_rows[chosen * a.units + i]);
  }
  return sum;
}

template <class T>
__device__ float action_branch(const RssmInputs<T>& a, int64_t b, int64_t i) {
  const float *action = a.action.data + b * a.action.row, *weight = a.action_weight + i * a.actions;
  float sum = 0.0f;
  for (int64_t j = 0; j < a.actions; ++j) sum += weight[j] * bounded(action[j]);
  return sum;
}

// silu(rms(pre) * scale) of one branch, to all copies of the operand.
template <class T>
__device__ void branch_out(const RssmInputs<T>& a, int64_t b, const float* pre, const float* scale,
                           int64_t column) {
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < a.units; i += blockDim.x) squares += pre[i] * pre[i];
  const float root = inverse_rms(squares, a.units);
  for (int64_t i = threadIdx.x; i < a.units; i += blockDim.x) {
    const float value = silu(pre[i] * root * scale[i]);
    T* out = a.x.data + b * a.x.row + column + i;
    for (int64_t c = 0; c < a.copies; ++c) narrow(value, out[c * a.x.block]);
  }
}

template <class T>
__device__ void inputs_row(const RssmInputs<T>& a, int64_t b) {
  const bool first = a.first.data != nullptr && a.first.data[b * a.first.row];
  float* pre = a.inner.data + b * a.inner.row;
  const int64_t u = a.units;
  for (int64_t i = threadIdx.x; i < u; i += blockDim.x) {
    pre[i] = a.deter_in.bias[i];
    pre[u + i] = a.stoch_in.bias[i];
    if (!first) {
      pre[i] += widen(a.from_deter[b * a.from_deter_row + i]);
      pre[u + i] += stoch_branch(a, b, i);
    }
    if (a.actions > 0) pre[2 * u + i] = a.action_in.bias[i] + action_branch(a, b, i);
  }
  branch_out(a, b, pre, a.deter_in.scale, 0);
  branch_out(a, b, pre + u, a.stoch_in.scale, u);
  if (a.actions > 0) branch_out(a, b, pre + 2 * u, a.action_in.scale, 2 * u);
  if (a.own.data == nullptr) return;
  const int64_t width = a.deter / a.blocks;
  const float* state = a.state.data + b * a.state.row;
  for (int64_t j = threadIdx.x; j < a.deter; j += blockDim.x) {
    T* to = a.own.data + j / width * a.own.block + b * a.own.row + j % width;
    narrow(first ? 0.0f : state[j], *to);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) row_kernel(RssmSample<T> sample, RssmInputs<T> inputs) {
  const int64_t b = blockIdx.x;
  if (sample.product != nullptr) sample_row(sample, b);
  __syncthreads();
  if (inputs.from_deter != nullptr) inputs_row(inputs, b);
}

template <class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(RssmNorm<T> a) {
  const int64_t b = blockIdx.x, n = a.blocks * a.width;
  const float* add = a.add.data + b * a.add.row;
  float *pre = a.pre.data + b * a.pre.row, squares = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const int64_t at = i / a.width * a.in.block + b * a.in.row + i % a.width;
    float value = widen(a.in.data[at]) + add[i];
    if (a.also.data != nullptr) {
      value += widen(a.also.data[i / a.width * a.also.block + b * a.also.row + i % a.width]);
    }
    pre[i] = value;
    squares += value * value;
  }
  const float root = inverse_rms(squares, n);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    T* to = a.out.data + i / a.width * a.out.block + b * a.out.row + i % a.width;
    narrow(silu(pre[i] * root * a.scale[i]), *to);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gates_kernel(RssmGates<T> a) {
  const int64_t d = a.deter / a.blocks;
  FWM_GRID_STRIDE(item, a.rows * a.deter) {
    const int64_t b = item / a.deter, j = item % a.deter, g = j / d, k = j % d;
    const T* in = a.in.data + g * a.in.block + b * a.in.row + k;
    const int64_t column = 3 * g * d + k;
    float raw[3];
    for (int i = 0; i < 3; ++i) {
      raw[i] = widen(in[i * d]) + a.bias[column + i * d];
      if (a.gates.data != nullptr) a.gates.data[b * a.gates.row + column + i * d] = raw[i];
    }
    const bool first = a.first.data != nullptr && a.first.data[b * a.first.row];
    const float before = first ? 0.0f : a.state.data[b * a.state.row + j];
    const float next = gru_gate(raw[0], raw[1], raw[2], before);
    a.out.data[b * a.out.row + j] = next;
    if (a.operand != nullptr) narrow(next, a.operand[item]);
  }
}

}  // namespace

template <class T>
cudaError_t rssm_row(const RssmSample<T>& sample, const RssmInputs<T>& inputs,
                     cudaStream_t stream) {
  const int64_t rows = sample.product != nullptr ? sample.rows : inputs.rows;
  row_kernel<T><<<(unsigned)rows, kThreads, 0, stream>>>(sample, inputs);
  return cudaGetLastError();
}

template <class T>
cudaError_t rssm_norm(const RssmNorm<T>& a, cudaStream_t stream) {
  norm_kernel<T><<<(unsigned)a.rows, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t rssm_gates(const RssmGates<T>& a, cudaStream_t stream) {
  gates_kernel<T><<<blocks_for(a.rows * a.deter), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

#define FWM_INSTANCES(T)                                                                   \
  template cudaError_t rssm_row(const RssmSample<T>&, const RssmInputs<T>&, cudaStream_t); \
  template cudaError_t rssm_norm(const RssmNorm<T>&, cudaStream_t);                        \
  template cudaError_t rssm_gates(const RssmGates<T>&, cudaStream_t);
FWM_INSTANCES(float)
FWM_INSTANCES(Bf16)

}  // namespace fastwm::cuda
