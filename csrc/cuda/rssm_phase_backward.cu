// The backward phases of the posterior sequence; see rssm_phase.h.
#include "cuda/rssm_phase.cuh"

namespace fastwm::cuda {
namespace {

// First half of a norm's backward, at index i of its row: e, and what it adds to the row's dot.
__device__ float norm_grad_begin(const PhaseNormGrad& a, int64_t b, int64_t i, float grad) {
  const float normed = a.pre.data[b * a.pre.row + i] * a.root.data[b * a.root.row];
  const float z = normed * a.scale[i], dz = grad * silu_grad(z);
  a.act.data[b * a.act.row + i] = silu(z);
  a.scales.data[b * a.scales.row + i] += dz * normed;
  const float e = dz * a.scale[i];
  a.e[b * a.dots.width + i] = e;
  return e * normed;
}

__device__ void begin(const PhaseNormGrad& a, const PhaseTile& at, const Place& to, int64_t panel,
                      int64_t i, float grad) {
  const float dot = to.valid ? norm_grad_begin(a, to.b, i, grad) : 0.0f;
  phase_partial(a.dots, at, panel, to.b, to.row, dot);
}

// Second half: the gradient of the pre-activation.
__device__ float norm_grad_end(const PhaseNormGrad& a, int64_t b, int64_t i, float mean) {
  const float root = a.root.data[b * a.root.row], pre = a.pre.data[b * a.pre.row + i];
  return root * (a.e[b * a.dots.width + i] - pre * root * mean);
}

// Reads through a norm; the leading panel of a block writes down what it reads.
struct ThroughNorm {
  const PhaseNormGrad& a;
  const float* means;
  int64_t b0, batch, skip;
  bool writes;

  __device__ float operator()(int row, int64_t k) const {
    const int64_t b = b0 + row;
    if (b >= batch) return 0.0f;
    const float value = norm_grad_end(a, b, skip + k, means[row]);
    if (writes) a.d_pre.data[b * a.d_pre.row + skip + k] = value;
    return value;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) back_kernel(PhaseBack a, const T* panels) {
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  auto load = [&](int row, int64_t k) {
    const int64_t b = at.b0 + row;
    return b < n.batch ? a.grad.data[b * a.grad.row + at.block * n.depth + k] : 0.0f;
  };
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth, load);
  const Place to(n, at);
  begin(a.to, at, to, at.panel, to.j, sums[0]);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) back_layer_kernel(PhaseBackLayer a, const T* panels) {
  __shared__ float means[kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  phase_means(a.from.dots, at, n.batch, means);
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth,
                ThroughNorm{a.from, means, at.b0, n.batch, at.block * n.depth, at.leads});
  const Place to(n, at);
  begin(a.to, at, to, at.panel, to.j, sums[0]);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) read_grad_kernel(PhaseReadGrad a, const T* panels) {
  __shared__ float means[2][kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  const int64_t units = n.depth / 2;
  const bool leads = at.panel == 0;
  phase_means(a.post.dots, at, n.batch, means[0]);
  if (a.later.e != nullptr) phase_means(a.later.dots, at, n.batch, means[1]);
  const ThroughNorm post{a.post, means[0], at.b0, n.batch, 0, leads};
  const ThroughNorm later{a.later, means[1], at.b0, n.batch, 0, leads};
  auto load = [&](int row, int64_t k) {
    if (k < units) return post(row, k);
    if (a.later.e == nullptr) return 0.0f;
    const float value = later(row, k - units);
    const int64_t b = at.b0 + row;
    return b < n.batch && a.later_first.data[b * a.later_first.row] ? 0.0f : value;
  };
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth, load);
  const Place to(n, at);
  if (!to.valid) return;
  float* carry = a.carry.data + to.b * a.carry.row + to.j;
  const float grad = *carry + sums[0] + a.grad.data[to.b * a.grad.row + to.j];
  const bool first = a.first.data[to.b * a.first.row];
  const float before = first ? 0.0f : a.state.data[to.b * a.state.row + to.j];
  const int64_t column = 3 * at.block * n.width + to.column;
  const float* raw = a.gates.data + to.b * a.gates.row + column;
  const GruGateGrad out = gru_gate_backward(grad, raw[0], raw[n.width], raw[2 * n.width], before);
  float* d = a.d_gates.data + to.b * a.d_gates.row + column;
  d[0] = out.reset;
  d[n.width] = out.cand;
  d[2 * n.width] = out.update;
  *carry = out.deter;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) inputs_grad_kernel(PhaseInputsGrad a, const T* own,
                                                               const T* inner) {
  __shared__ float means[kPhaseRows];
  const bool to_state = blockIdx.x < a.own.panels();  // the same for all threads of a block
  const PhaseShape& n = to_state ? a.own : a.inner;
  const PhaseTile at(n, to_state ? blockIdx.x : blockIdx.x - a.own.panels());
  phase_means(a.hidden.dots, at, n.batch, means);
  float sums[1];
  const int64_t skip = to_state ? at.block * n.depth : 0;
  phase_product(sums, (to_state ? own : inner) + at.panel * n.depth * kPhaseColumns, n.depth,
                ThroughNorm{a.hidden, means, at.b0, n.batch, skip, to_state && at.leads});
  const Place to(n, at);
  if (!to_state) {
    const int64_t panel = at.panel - at.block * phase_panels(1, n.width);
    begin(at.block == 0 ? a.deter : a.stoch, at, to, panel, to.column, sums[0]);
  } else if (to.valid) {
    float* carry = a.carry.data + to.b * a.carry.row + to.j;
    *carry = a.first.data[to.b * a.first.row] ? 0.0f : *carry + sums[0];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) stoch_grad_kernel(PhaseStochGrad a, const T* panels) {
  __shared__ float means[kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  phase_means(a.stoch.dots, at, n.batch, means);
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth,
                ThroughNorm{a.stoch, means, at.b0, n.batch, 0, at.leads});
  const Place to(n, at);
  if (!to.valid) return;
  a.carried[to.b * n.width + to.j] = a.first.data[to.b * a.first.row] ? 0.0f : sums[0];
}

__global__ void __launch_bounds__(kThreads, 2) roots_kernel(ConstRows pre, int64_t width,
                                                         float* root) {
  const float* x = pre.data + (int64_t)blockIdx.x * pre.row;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) squares += x[i] * x[i];
  const float value = inverse_rms(squares, width);
  if (threadIdx.x == 0) root[blockIdx.x] = value;
}

__global__ void __launch_bounds__(kThreads, 2) finish_kernel(PhaseNormGrad a, int64_t width) {
  const int64_t b = blockIdx.x;
  float dot = 0.0f;
  for (int64_t i = threadIdx.x; i < a.dots.panels; i += blockDim.x) {
    dot += a.dots.data[b * a.dots.panels + i];
  }
  const float mean = block_sum(dot) / (float)a.dots.width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    a.d_pre.data[b * a.d_pre.row + i] = norm_grad_end(a, b, i, mean);
  }
}

}  // namespace

#define FWM_PHASE(name, kernel, Args)                                                  \
  template <class T>                                                                   \
  cudaError_t name(const Args& a, const T* panels, cudaStream_t stream) {              \
    const dim3 grid = phase_grid(a.shape.panels(), a.shape.batch);                     \
    kernel<T><<<grid, kThreads, 0, stream>>>(a, panels);                               \
    return cudaGetLastError();                                                         \
  }                                                                                    \
  template cudaError_t name(const Args&, const float*, cudaStream_t);                  \
  template cudaError_t name(const Args&, const Bf16*, cudaStream_t);

FWM_PHASE(phase_back, back_kernel, PhaseBack)
FWM_PHASE(phase_back_layer, back_layer_kernel, PhaseBackLayer)
FWM_PHASE(phase_read_grad, read_grad_kernel, PhaseReadGrad)
FWM_PHASE(phase_stoch_grad, stoch_grad_kernel, PhaseStochGrad)

template <class T>
cudaError_t phase_inputs_grad(const PhaseInputsGrad& a, const T* own, const T* inner,
                              cudaStream_t stream) {
  const dim3 grid = phase_grid(a.own.panels() + a.inner.panels(), a.own.batch);
  inputs_grad_kernel<T><<<grid, kThreads, 0, stream>>>(a, own, inner);
  return cudaGetLastError();
}
template cudaError_t phase_inputs_grad(const PhaseInputsGrad&, const float*, const float*,
                                       cudaStream_t);
template cudaError_t phase_inputs_grad(const PhaseInputsGrad&, const Bf16*, const Bf16*,
                                       cudaStream_t);

cudaError_t phase_roots(const ConstRows& pre, int64_t rows, int64_t width, float* root,
                        cudaStream_t stream) {
  roots_kernel<<<(unsigned)rows, kThreads, 0, stream>>>(pre, width, root);
  return cudaGetLastError();
}

cudaError_t phase_finish(const PhaseNormGrad& a, int64_t rows, int64_t width,
                         cudaStream_t stream) {
  finish_kernel<<<(unsigned)rows, kThreads, 0, stream>>>(a, width);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
