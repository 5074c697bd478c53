// LaProp with adaptive clipping, Adam, and the moving average. Three launches for up to 448
// tensors: sums of squares per chunk, norms and factors per tensor, the update. Sums are in double
// and in a fixed order. Nothing is read on the host: learning rate, step and scale are tensors.
#include "cuda/optim.h"

#include "cuda/warps.cuh"
#include "scalars.h"

namespace fastwm::cuda {
namespace {

constexpr int kSettleThreads = 1024;

// The tensor that a chunk belongs to: the last one that begins at it or before. Tensors without
// elements share their beginning with the next and are passed over.
template <class Table>
__device__ int tensor_of(const Table& table, int chunk) {
  int low = 0, high = table.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.tensor[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The elements [begin, end) of a chunk within its tensor.
template <class Tensor>
struct Span {
  int64_t begin, end;
  __device__ Span(const Tensor& tensor, int chunk)
      : begin((chunk - tensor.first_chunk) * kChunk),
        end(begin + kChunk < tensor.count ? begin + kChunk : tensor.count) {}
};

// Over the block; valid in thread 0.
__device__ double block_total(double x, double* partial) {
  x = warp_sum(x);
  __syncthreads();  // whoever still reads the last total
  if (threadIdx.x % kWarpThreads == 0) partial[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  double total = 0.0;
  for (unsigned i = 0; i < blockDim.x / kWarpThreads; ++i) total += partial[i];
  return total;
}

__global__ void sums_kernel(const __grid_constant__ OptimTable table, OptimState state) {
  __shared__ double partial[kWarpThreads];
  const int chunk = static_cast<int>(blockIdx.x);
  const OptimTensor& tensor = table.tensor[tensor_of(table, chunk)];
  const Span<OptimTensor> span(tensor, chunk);
  if (chunk == 0) {  // where the tensors' chunks begin, for settle
    for (int i = static_cast<int>(threadIdx.x); i <= table.tensors; i += kThreads) {
      const int32_t first = i < table.tensors ? table.tensor[i].first_chunk : table.chunks;
      state.first_chunk[table.tensor_offset + i] = static_cast<int32_t>(table.chunk_offset) + first;
    }
  }
  double grads = 0.0, params = 0.0;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    grads += static_cast<double>(tensor.grad[i]) * tensor.grad[i];
    params += static_cast<double>(tensor.param[i]) * tensor.param[i];
  }
  grads = block_total(grads, partial);
  params = block_total(params, partial);
  if (threadIdx.x == 0) {
    state.sums[2 * (table.chunk_offset + chunk)] = grads;
    state.sums[2 * (table.chunk_offset + chunk) + 1] = params;
  }
}

// One block: a warp per tensor adds its chunks, then all tensors are added in order.
__global__ void settle_kernel(OptimSettings s, OptimState state) {
  __shared__ double partial[kWarpThreads];
  const double scale = s.grad_scale != nullptr ? static_cast<double>(*s.grad_scale) : 1.0;
  double all = 0.0;
  FWM_WARP_STRIDE(t, s.tensors) {
    const int64_t begin = state.first_chunk[t], end = state.first_chunk[t + 1];
    double grads = 0.0, params = 0.0;
    for (int64_t i = begin + threadIdx.x % kWarpThreads; i < end; i += kWarpThreads) {
      grads += state.sums[2 * i];
      params += state.sums[2 * i + 1];
    }
    const double norm = sqrt(warp_sum(grads)) / scale, size = sqrt(warp_sum(params));
    if (threadIdx.x % kWarpThreads == 0) {
      all += norm * norm;
      const double limit = s.agc * fmax(s.pmin, size);
      const double clip = s.agc > 0.0 ? fmax(1.0, norm / limit) : 1.0;
      state.factor[t] = static_cast<float>(1.0 / (scale * clip));
    }
  }
  const double total = sqrt(block_total(all, partial));
  if (threadIdx.x != 0) return;
  const bool finite = isfinite(total);
  const double excess = s.clip_norm > 0.0 ? fmax(1.0, total / s.clip_norm) : 1.0;
  state.scalars[2] = static_cast<float>(1.0 / (scale * excess));
  *s.norm = static_cast<float>(total);
  *s.finite = finite;
  const double done = s.step_long != nullptr ? static_cast<double>(*s.step_long) : *s.step_float;
  state.scalars[0] = static_cast<float>(1.0 / (1.0 - pow(s.beta1, done + 1.0)));
  state.scalars[1] = static_cast<float>(1.0 / (1.0 - pow(s.beta2, done + 1.0)));
  if (finite && s.step_long != nullptr) *s.step_long += 1;
  if (finite && s.step_float != nullptr) *s.step_float += 1.0f;
}

template <bool kAdam>
__global__ void update_kernel(const __grid_constant__ OptimTable table, OptimSettings s,
                              OptimState state) {
  if (!*s.finite) return;
  const int chunk = static_cast<int>(blockIdx.x), at = tensor_of(table, chunk);
  const OptimTensor& tensor = table.tensor[at];
  const Span<OptimTensor> span(tensor, chunk);
  const OptimStep step{*s.lr,
                       static_cast<float>(s.beta1),
                       static_cast<float>(s.beta2),
                       s.eps,
                       static_cast<float>(1.0 - s.beta1),
                       static_cast<float>(1.0 - s.beta2),
                       state.scalars[0],
                       state.scalars[1],
                       kAdam ? state.scalars[2] : state.factor[table.tensor_offset + at],
                       tensor.weight_decay,
                       s.clip_value > 0.0 ? static_cast<float>(s.clip_value) : INFINITY,
                       s.nesterov,
                       s.decoupled};
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    float param = tensor.param[i], mu = tensor.mu[i], nu = tensor.nu[i];
    if constexpr (kAdam) {
      adam_element(step, tensor.grad[i], param, mu, nu);
    } else {
      laprop_element(step, tensor.grad[i], param, mu, nu);
    }
    tensor.param[i] = param;
    tensor.mu[i] = mu;
    tensor.nu[i] = nu;
    if (tensor.slow != nullptr) {
      tensor.slow[i] = s.slow_rate * param + (1.0f - s.slow_rate) * tensor.slow[i];
    }
    if (tensor.low != nullptr) narrow(param, tensor.low[i]);
  }
}

__global__ void ema_kernel(const __grid_constant__ EmaTable table, float rate,
                           const bool* __restrict__ finite) {
  if (finite != nullptr && !*finite) return;
  const int chunk = static_cast<int>(blockIdx.x);
  const EmaTensor& tensor = table.tensor[tensor_of(table, chunk)];
  const Span<EmaTensor> span(tensor, chunk);
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    tensor.slow[i] = rate * tensor.fast[i] + (1.0f - rate) * tensor.slow[i];
  }
}

}  // namespace

cudaError_t optim_sums(const OptimTable& table, const OptimState& state, cudaStream_t stream) {
  const unsigned blocks = table.chunks > 0 ? table.chunks : 1;
  sums_kernel<<<blocks, kThreads, 0, stream>>>(table, state);
  return cudaGetLastError();
}

cudaError_t optim_settle(const OptimSettings& settings, const OptimState& state,
                         cudaStream_t stream) {
  settle_kernel<<<1, kSettleThreads, 0, stream>>>(settings, state);
  return cudaGetLastError();
}

cudaError_t optim_update(const OptimTable& table, const OptimSettings& settings,
                         const OptimState& state, cudaStream_t stream) {
  if (table.chunks == 0) return cudaSuccess;
  if (settings.adam) {
    update_kernel<true><<<(unsigned)table.chunks, kThreads, 0, stream>>>(table, settings, state);
  } else {
    update_kernel<false><<<(unsigned)table.chunks, kThreads, 0, stream>>>(table, settings, state);
  }
  return cudaGetLastError();
}

cudaError_t ema_update(const EmaTable& table, float rate, const bool* finite, cudaStream_t stream) {
  if (table.chunks == 0) return cudaSuccess;
  ema_kernel<<<(unsigned)table.chunks, kThreads, 0, stream>>>(table, rate, finite);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
