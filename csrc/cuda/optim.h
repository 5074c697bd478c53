// The optimizer on the GPU. All tensors of a list are one sequence of chunks, a block each; the
// table of tensors travels as a kernel argument, so that nothing is copied and a graph keeps it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "bf16.h"

namespace fastwm::cuda {

// Elements of a block: so many that there are about a thousand blocks, for every block reads the
// sums of all, but no fewer than keep it busy.
inline int64_t elements_of_block(int64_t elements) {
  constexpr int64_t kLeast = 8192, kBlocks = 1024, kThreads = 256;
  const int64_t share = (elements + kBlocks * kThreads - 1) / (kBlocks * kThreads) * kThreads;
  return share > kLeast ? share : kLeast;
}
// What fits the arguments of a kernel: 32 kB since CUDA 12.1, 4 kB before.
constexpr int kTableTensors = CUDART_VERSION >= 12010 ? 448 : 48;

struct OptimTensor {
  float *param, *mu, *nu;
  const float* grad;
  float* slow;  // copies that follow the parameter; may be null
  Bf16* low;
  int64_t count;
  int32_t first_chunk;  // of this table
  float weight_decay;
};
struct OptimTable {
  int32_t tensors, chunks;
  int64_t elements;      // of a chunk
  int64_t chunk_offset;  // of this table in the whole list
  bool first;            // of the whole list
  OptimTensor tensor[kTableTensors];
};

// What the kernels hand on in device memory.
struct OptimState {
  double *grads, *params;  // (chunks): sums of squares
  float* corrections;      // (2), of both moments
};
struct OptimSettings {
  bool adam;
  const float* lr;
  const float* grad_scale;  // may be null
  int64_t* step_long;       // one of the two
  float* step_float;
  double agc, pmin;              // LaProp
  double clip_norm, clip_value;  // Adam; 0: off
  double beta1, beta2;
  float eps, slow_rate;
  bool nesterov, decoupled;
  int64_t chunks;  // of the whole list
  float* norm;     // out
  bool* finite;    // out
};

// In this order: the sums of every table, then the update of every table. Both take the whole
// list's first table even if it is empty.
cudaError_t optim_sums(const OptimTable& table, const OptimSettings& settings,
                       const OptimState& state, cudaStream_t stream);
cudaError_t optim_update(const OptimTable& table, const OptimSettings& settings,
                         const OptimState& state, cudaStream_t stream);

struct EmaTensor {
  float* slow;
  const float* fast;
  int64_t count;
  int32_t first_chunk;
};
struct EmaTable {
  int32_t tensors, chunks;
  int64_t elements;  // of a chunk
  EmaTensor tensor[kTableTensors];
};
cudaError_t ema_update(const EmaTable& table, float rate, const bool* finite, cudaStream_t stream);

}  // namespace fastwm::cuda
