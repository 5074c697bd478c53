// The RSSM kernels between the library's products: one launch per call, a block per row where a norm
// needs the whole row. T is the type of operands and products: float or bfloat16; everything else is
// float32. Row b of a (B, T, width) tensor at step t is data + b * row, with data moved to step t.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "bf16.h"

namespace fastwm::cuda {

struct Rows {  // float32 output or input; row 0: the same vector for all rows
  float* data = nullptr;
  int64_t row = 0;
};

struct ConstRows {
  const float* data = nullptr;
  int64_t row = 0;
};

// (blocks, rows, width): what a product per block reads or writes.
template <class T>
struct Grouped {
  T* data = nullptr;
  int64_t block = 0, row = 0;
};

struct Flags {  // is_first of one step; null: no resets
  const bool* data = nullptr;
  int64_t row = 0;
};

struct RssmNormLayer {
  const float *bias, *scale;
};

// logits = product + bias, and a class per group; `scratch` (rows, groups * (classes | 1)) floats.
template <class T>
struct RssmSample {
  int64_t rows, groups, classes;
  float unimix;
  const T* product;  // (rows, S*K); null: nothing is sampled
  const float* bias;
  Rows logits, one_hot;  // one_hot may be absent
  ConstRows noise;       // (rows, S) uniform; absent: the mode
  int32_t* index;        // (rows, S)
  uint8_t* index8;       // the same for the caller, one of the two or none
  int64_t* index64;
  int64_t index_row;
  float* scratch;
};

// The input branches of a step, after resets: pre-activations, then silu(rms(.)) to the operand x,
// `copies` times, and the state itself block by block to `own`.
template <class T>
struct RssmInputs {
  int64_t rows, deter, units, blocks, groups, classes, actions;
  Flags first;
  ConstRows state;        // (rows, D)
  const T* from_deter;    // (rows, …) product of the state with deter_in; null: no inputs
  int64_t from_deter_row;
  const T* from_stoch;    // (rows, U) product of a dense latent; null: gather by index
  const T* stoch_rows;    // (S*K, U)
  const int32_t* index;   // (rows, S)
  ConstRows action;       // (rows, A), where actions > 0
  const float* action_weight;  // (U, A)
  RssmNormLayer deter_in, stoch_in, action_in;
  Rows inner;             // (rows, 2U or 3U) pre-activations
  Grouped<T> x;           // (copies, rows, 2U or 3U)
  int64_t copies;
  Grouped<T> own;         // (blocks, rows, D/G); may be absent
};

// pre = in + also + add; out = silu(rms(pre) * scale); the norm runs over all blocks.
template <class T>
struct RssmNorm {
  int64_t rows, blocks, width;
  Grouped<const T> in, also;  // `also` may be absent
  ConstRows add;
  Rows pre;
  const float* scale;
  Grouped<T> out;
};

// gates = in + bias; out = the next state, also as an operand.
template <class T>
struct RssmGates {
  int64_t rows, deter, blocks;
  Grouped<const T> in;  // (G, rows, 3D/G)
  const float* bias;
  Flags first;
  ConstRows state;
  Rows gates, out;      // gates may be absent
  T* operand;           // (rows, D), may be absent
};

template <class T>
struct RssmSampleGrad {
  int64_t rows, groups, classes;
  float unimix;
  const T* carried;  // (rows, S*K) gradient of the latent from the step after; null: none
  ConstRows grad_stoch, grad_logits, logits;
  Rows d_logits;
  T* operand;        // (rows, S*K)
};

// Through out = silu(rms(pre) * scale): d_pre, the activation again, and += the scale's gradient.
template <class T>
struct RssmNormGrad {
  int64_t rows, blocks, width;
  Grouped<const T> grad;
  ConstRows pre;
  const float* scale;
  Rows d_pre, act, scales;
  Grouped<T> operand;
};

template <class T>
struct RssmGatesGrad {
  int64_t rows, deter, blocks;
  const T* product;  // (rows, D): what the readers of the new state send back
  ConstRows grad, gates, state;
  Flags first;       // of this step
  Rows carry;        // (rows, D): in, what skips later steps; out, what skips this one
  Rows d_gates;
  Grouped<T> operand;  // (G, rows, 3D/G)
};

// From (G, rows, D/G + 2U), summed over G where shared: both branches, and += carry, zero at resets.
template <class T>
struct RssmInputsGrad {
  int64_t rows, deter, units, blocks;
  Grouped<const T> grad;
  ConstRows inner;
  const float *deter_scale, *stoch_scale;
  Flags first;
  Rows d_inner, act, deter_scales, stoch_scales, carry;
  Grouped<T> to_deter;  // (1, rows, U) operands of the step before, zero at resets
  Grouped<T> to_stoch;
};

template <class T>
cudaError_t rssm_row(const RssmSample<T>& sample, const RssmInputs<T>& inputs, cudaStream_t stream);
template <class T>
cudaError_t rssm_norm(const RssmNorm<T>& a, cudaStream_t stream);
template <class T>
cudaError_t rssm_gates(const RssmGates<T>& a, cudaStream_t stream);
template <class T>
cudaError_t rssm_sample_backward(const RssmSampleGrad<T>& a, cudaStream_t stream);
template <class T>
cudaError_t rssm_norm_backward(const RssmNormGrad<T>& a, cudaStream_t stream);
template <class T>
cudaError_t rssm_gates_backward(const RssmGatesGrad<T>& a, cudaStream_t stream);
template <class T>
cudaError_t rssm_inputs_backward(const RssmInputsGrad<T>& a, cudaStream_t stream);

}  // namespace fastwm::cuda
