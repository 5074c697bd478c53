// LaProp with adaptive clipping, Adam, and the moving average. Two launches for up to 448 tensors:
// sums of squares per chunk; the update, where every block adds these sums for itself, which are
// few. Sums are in double and in a fixed order. No block waits for another, and nothing is read on
// the host: learning rate, step and scale are tensors.
#include "cuda/optim.h"

#include "cuda/warps.cuh"
#include "scalars.h"

namespace fastwm::cuda {
namespace {

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
  __device__ Span(const Tensor& tensor, int chunk, int64_t elements)
      : begin((chunk - tensor.first_chunk) * elements),
        end(begin + elements < tensor.count ? begin + elements : tensor.count) {}
};

// Over the block; every thread gets the result.
__device__ double block_total(double x, double* partial) {
  x = warp_sum(x);
  __syncthreads();  // whoever still reads the last total
  if (threadIdx.x % kWarpThreads == 0) partial[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  double total = 0.0;
  for (unsigned i = 0; i < blockDim.x / kWarpThreads; ++i) total += partial[i];
  return total;
}

__global__ void sums_kernel(const __grid_constant__ OptimTable table, OptimSettings s,
                            OptimState state) {
  __shared__ double partial[kWarpThreads];
  const int chunk = static_cast<int>(blockIdx.x);
  const OptimTensor& tensor = table.tensor[tensor_of(table, chunk)];
  const Span<OptimTensor> span(tensor, chunk, table.elements);
  double grads = 0.0, params = 0.0;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    grads += static_cast<double>(tensor.grad[i]) * tensor.grad[i];
    params += static_cast<double>(tensor.param[i]) * tensor.param[i];
  }
  grads = block_total(grads, partial);
  params = block_total(params, partial);
  if (threadIdx.x != 0) return;
  if (chunk < table.chunks) {
    state.grads[table.chunk_offset + chunk] = grads;
    state.params[table.chunk_offset + chunk] = params;
  }
  if (table.first && chunk == 0) {  // now, for the update counts the step up
    const double done = s.step_long != nullptr ? static_cast<double>(*s.step_long) : *s.step_float;
    state.corrections[0] = static_cast<float>(1.0 / (1.0 - pow(s.beta1, done + 1.0)));
    state.corrections[1] = static_cast<float>(1.0 / (1.0 - pow(s.beta2, done + 1.0)));
  }
}

// What the gradients of a tensor are multiplied with, from the sums of all its chunks and of all
// chunks there are; NaN if a gradient is not finite. The first thread of all says what was found.
template <bool kAdam>
__device__ float settle(const OptimTable& table, const OptimTensor& tensor, const OptimSettings& s,
                        const OptimState& state, double* partial) {
  const int64_t first = table.chunk_offset + tensor.first_chunk;
  const int64_t last = first + (tensor.count + table.elements - 1) / table.elements;
  double all = 0.0, grads = 0.0, params = 0.0;
  for (int64_t i = threadIdx.x; i < s.chunks; i += blockDim.x) {
    all += state.grads[i];
    if (!kAdam && first <= i && i < last) {
      grads += state.grads[i];
      params += state.params[i];
    }
  }
  all = block_total(all, partial);
  if constexpr (!kAdam) {
    grads = block_total(grads, partial);
    params = block_total(params, partial);
  }
  __shared__ float factor;
  if (threadIdx.x == 0) {
    const double scale = s.grad_scale != nullptr ? static_cast<double>(*s.grad_scale) : 1.0;
    const double norm = sqrt(all) / fabs(scale);
    const bool finite = isfinite(norm);
    double excess = 1.0;
    if (kAdam && s.clip_norm > 0.0) excess = fmax(1.0, norm / s.clip_norm);
    if (!kAdam && s.agc > 0.0) {
      excess = fmax(1.0, sqrt(grads) / fabs(scale) / (s.agc * fmax(s.pmin, sqrt(params))));
    }
    factor = finite ? static_cast<float>(1.0 / (scale * excess)) : NAN;
    if (table.first && blockIdx.x == 0) {
      *s.norm = static_cast<float>(norm);
      *s.finite = finite;
      if (finite && s.step_long != nullptr) *s.step_long += 1;
      if (finite && s.step_float != nullptr) *s.step_float += 1.0f;
    }
  }
  __syncthreads();
  return factor;
}

template <bool kAdam>
__global__ void update_kernel(const __grid_constant__ OptimTable table, OptimSettings s,
                              OptimState state) {
  __shared__ double partial[kWarpThreads];
  const int chunk = static_cast<int>(blockIdx.x);
  const OptimTensor& tensor = table.tensor[tensor_of(table, chunk)];
  const Span<OptimTensor> span(tensor, chunk, table.elements);
  const float factor = settle<kAdam>(table, tensor, s, state, partial);
  if (isnan(factor)) return;
  const OptimStep step{*s.lr,
                       static_cast<float>(s.beta1),
                       static_cast<float>(s.beta2),
                       s.eps,
                       static_cast<float>(1.0 - s.beta1),
                       static_cast<float>(1.0 - s.beta2),
                       state.corrections[0],
                       state.corrections[1],
                       factor,
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
  const Span<EmaTensor> span(tensor, chunk, table.elements);
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    tensor.slow[i] = rate * tensor.fast[i] + (1.0f - rate) * tensor.slow[i];
  }
}

// At least one, which counts the step and sets the flag where there is nothing to update.
unsigned blocks_of(const OptimTable& table) {
  return table.chunks > 0 ? static_cast<unsigned>(table.chunks) : 1;
}

}  // namespace

cudaError_t optim_sums(const OptimTable& table, const OptimSettings& settings,
                       const OptimState& state, cudaStream_t stream) {
  sums_kernel<<<blocks_of(table), kThreads, 0, stream>>>(table, settings, state);
  return cudaGetLastError();
}

cudaError_t optim_update(const OptimTable& table, const OptimSettings& settings,
                         const OptimState& state, cudaStream_t stream) {
  if (settings.adam) {
    update_kernel<true><<<blocks_of(table), kThreads, 0, stream>>>(table, settings, state);
  } else {
    update_kernel<false><<<blocks_of(table), kThreads, 0, stream>>>(table, settings, state);
  }
  return cudaGetLastError();
}

cudaError_t ema_update(const EmaTable& table, float rate, const bool* finite, cudaStream_t stream) {
  if (table.chunks == 0) return cudaSuccess;
  ema_kernel<<<(unsigned)table.chunks, kThreads, 0, stream>>>(table, rate, finite);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
