// One kernel per layer of the posterior sequence: a product with what comes before and after it, for
// 16 rows and 16 output columns of a block of threads. Weights lie in panels of 16 columns, in T:
// float or bfloat16; everything else, sums included, is float32.
//
// A norm needs the whole row, which many blocks of threads share. So the phase that makes a row
// leaves one partial sum per panel, and the phase that reads it adds them up, in order.
#pragma once

#include "cuda/rssm.h"

namespace fastwm::cuda {

constexpr int kPhaseRows = 16, kPhaseColumns = 16;

FWM_HD int64_t phase_panels(int64_t blocks, int64_t width) {
  return blocks * ((width + kPhaseColumns - 1) / kPhaseColumns);
}

// Sizes of a phase: per block a product of `depth` inputs to `width` columns.
struct PhaseShape {
  int64_t batch, blocks, width, depth;
  FWM_HD int64_t panels() const { return phase_panels(blocks, width); }
};

// Numbers [first, first + depth) of each panel's depth, from weight[block][k][column] by strides.
// `parts` panels stand side by side for the same columns; this is number `part`.
struct PhasePack {
  const float* weight;
  int64_t block_stride, k_stride, column_stride;
  int64_t blocks, width, depth, first, whole_depth, parts, part;
};

// Partial sums of a row: (rows, panels), and what their total is divided by.
struct Partials {
  float* data;
  int64_t panels, width;
};

struct PhaseHidden {  // first hidden layer: [state of the block, x] -> pre = product + add
  PhaseShape shape;
  const float *own, *x;  // (rows, D), (rows, 2U)
  int64_t units;
  ConstRows add;
  Rows pre;
  Partials squares;
};

struct PhaseActivated {  // what a phase reads through silu(rms(pre) * scale)
  ConstRows pre;
  const float* scale;
  Partials squares;
};

struct PhaseLayer {  // a further layer: pre = activated product + add
  PhaseShape shape;
  PhaseActivated in;
  ConstRows add;
  Rows pre;
  Partials squares;
};

struct PhaseGates {  // 3 parts a panel
  PhaseShape shape;
  PhaseActivated in;
  const float* bias;
  Flags first;
  ConstRows state;
  Rows gates, out;
};

struct PhaseRead {  // shape.blocks = 2: the first posterior layer, the next step's deter branch
  PhaseShape shape;
  ConstRows state, add;
  Rows post;
  Partials squares;
  float* raw;  // (rows, U)
};

struct PhaseLogits {
  PhaseShape shape;
  PhaseActivated in;
  float* product;  // (rows, S*K)
};

// Backward through a norm, in two halves: the phase that finds the gradient g of the activation
// leaves e = g silu' scale and partial sums of e pre root; the next one reads
// d_pre = root (e - pre root mean), and its first panel of each block writes it down.
struct PhaseNormGrad {
  ConstRows pre, root;  // root (rows, 1)
  const float* scale;
  Rows act, scales;
  float* e;             // (rows, width)
  Partials dots;
  Rows d_pre;
};

struct PhaseBack {  // rows -> e of the layer before
  PhaseShape shape;
  ConstRows grad;
  PhaseNormGrad to;
};

struct PhaseBackLayer {  // through a norm -> e of the layer before
  PhaseShape shape;
  PhaseNormGrad from, to;
};

struct PhaseReadGrad {  // [first posterior layer, deter branch of the step after] -> the state's gates
  PhaseShape shape;
  PhaseNormGrad post, later;  // later.e null: there is no step after
  Flags later_first, first;
  Rows carry;
  ConstRows grad, gates, state;
  Rows d_gates;
};

struct PhaseInputsGrad {  // of the first hidden layer: the state before, and both branches
  PhaseShape own, inner;  // inner.blocks = 2
  PhaseNormGrad hidden, deter, stoch;
  Flags first;
  Rows carry;
};

struct PhaseStochGrad {  // the latent branch -> gradient of the latent, zero at resets
  PhaseShape shape;
  PhaseNormGrad stoch;
  Flags first;
  float* carried;  // (rows, S*K)
};

template <class T>
cudaError_t phase_pack(const PhasePack& a, T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_hidden(const PhaseHidden& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_layer(const PhaseLayer& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_gates(const PhaseGates& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_read(const PhaseRead& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_logits(const PhaseLogits& a, const T* panels, cudaStream_t stream);

template <class T>
cudaError_t phase_back(const PhaseBack& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_back_layer(const PhaseBackLayer& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_read_grad(const PhaseReadGrad& a, const T* panels, cudaStream_t stream);
template <class T>
cudaError_t phase_inputs_grad(const PhaseInputsGrad& a, const T* own, const T* inner,
                              cudaStream_t stream);
template <class T>
cudaError_t phase_stoch_grad(const PhaseStochGrad& a, const T* panels, cudaStream_t stream);

// root[r] = 1 / rms of a row of pre.
cudaError_t phase_roots(const ConstRows& pre, int64_t rows, int64_t width, float* root,
                        cudaStream_t stream);
// d_pre from e where no phase follows that would read it.
cudaError_t phase_finish(const PhaseNormGrad& a, int64_t rows, int64_t width, cudaStream_t stream);

}  // namespace fastwm::cuda
