// The forward phases of the posterior sequence; see rssm_phase.h.
#include "cuda/rssm_phase.cuh"

namespace fastwm::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) pack_kernel(PhasePack a, T* panels) {
  const int64_t each = phase_panels(1, a.width), count = a.blocks * each * a.depth * kPhaseColumns;
  FWM_GRID_STRIDE(i, count) {
    const int64_t c = i % kPhaseColumns, k = i / kPhaseColumns % a.depth;
    const int64_t panel = i / (kPhaseColumns * a.depth), column = panel % each * kPhaseColumns + c;
    const float* from = a.weight + panel / each * a.block_stride + k * a.k_stride;
    const int64_t at = (panel * a.parts + a.part) * a.whole_depth + a.first + k;
    narrow(column < a.width ? from[column * a.column_stride] : 0.0f,
           panels[at * kPhaseColumns + c]);
  }
}

__device__ void store_pre(const PhaseTile& at, const Place& to, int64_t panel, float sum,
                          const ConstRows& add, const Rows& pre, const Partials& squares) {
  float value = 0.0f;
  if (to.valid) {
    value = sum + add.data[to.b * add.row + to.j];
    pre.data[to.b * pre.row + to.j] = value;
  }
  phase_partial(squares, at, panel, to.b, to.row, value * value);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) hidden_kernel(PhaseHidden a, const T* panels) {
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  auto load = [&](int row, int64_t k) {
    const int64_t b = at.b0 + row;
    if (b >= n.batch) return 0.0f;
    if (k < n.width) return a.own[b * n.blocks * n.width + at.block * n.width + k];
    return a.x[b * 2 * a.units + k - n.width];
  };
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth, load);
  store_pre(at, Place(n, at), at.panel, sums[0], a.add, a.pre, a.squares);
}

// The activations of the layer before, a block's share of them where it has blocks.
struct Activated {
  const PhaseActivated& in;
  const float* means;
  int64_t b0, batch, skip;

  __device__ float operator()(int row, int64_t k) const {
    const int64_t b = b0 + row;
    if (b >= batch) return 0.0f;
    const float root = 1.0f / sqrtf(means[row] + kRmsEps);
    return silu(in.pre.data[b * in.pre.row + skip + k] * root * in.scale[skip + k]);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) layer_kernel(PhaseLayer a, const T* panels) {
  __shared__ float means[kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  phase_means(a.in.squares, at, n.batch, means);
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth,
                Activated{a.in, means, at.b0, n.batch, at.block * n.depth});
  store_pre(at, Place(n, at), at.panel, sums[0], a.add, a.pre, a.squares);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gates_kernel(PhaseGates a, const T* panels) {
  __shared__ float means[kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  phase_means(a.in.squares, at, n.batch, means);
  float sums[3];
  phase_product(sums, panels + at.panel * 3 * n.depth * kPhaseColumns, n.depth,
                Activated{a.in, means, at.b0, n.batch, at.block * n.depth});
  const Place to(n, at);
  if (!to.valid) return;
  const int64_t column = 3 * at.block * n.width + to.column;
  for (int i = 0; i < 3; ++i) {
    sums[i] += a.bias[column + i * n.width];
    a.gates.data[to.b * a.gates.row + column + i * n.width] = sums[i];
  }
  const bool first = a.first.data[to.b * a.first.row];
  const float before = first ? 0.0f : a.state.data[to.b * a.state.row + to.j];
  a.out.data[to.b * a.out.row + to.j] = gru_gate(sums[0], sums[1], sums[2], before);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) read_kernel(PhaseRead a, const T* panels) {
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  auto load = [&](int row, int64_t k) {
    const int64_t b = at.b0 + row;
    return b < n.batch ? a.state.data[b * a.state.row + k] : 0.0f;
  };
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth, load);
  const Place to(n, at);
  if (at.block == 0) {
    store_pre(at, to, at.panel, sums[0], a.add, a.post, a.squares);
  } else if (to.valid) {
    a.raw[to.b * n.width + to.column] = sums[0];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) logits_kernel(PhaseLogits a, const T* panels) {
  __shared__ float means[kPhaseRows];
  const PhaseShape& n = a.shape;
  const PhaseTile at(n, blockIdx.x);
  phase_means(a.in.squares, at, n.batch, means);
  float sums[1];
  phase_product(sums, panels + at.panel * n.depth * kPhaseColumns, n.depth,
                Activated{a.in, means, at.b0, n.batch, 0});
  const Place to(n, at);
  if (to.valid) a.product[to.b * n.width + to.j] = sums[0];
}

}  // namespace

template <class T>
cudaError_t phase_pack(const PhasePack& a, T* panels, cudaStream_t stream) {
  const int64_t count = phase_panels(a.blocks, a.width) * a.depth * kPhaseColumns;
  pack_kernel<T><<<blocks_for(count), kThreads, 0, stream>>>(a, panels);
  return cudaGetLastError();
}

#define FWM_PHASE(name, kernel, Args)                                                  \
  template <class T>                                                                   \
  cudaError_t name(const Args& a, const T* panels, cudaStream_t stream) {              \
    const dim3 grid = phase_grid(a.shape.panels(), a.shape.batch);                     \
    kernel<T><<<grid, kThreads, 0, stream>>>(a, panels);                               \
    return cudaGetLastError();                                                         \
  }                                                                                    \
  template cudaError_t name(const Args&, const float*, cudaStream_t);                  \
  template cudaError_t name(const Args&, const Bf16*, cudaStream_t);

FWM_PHASE(phase_hidden, hidden_kernel, PhaseHidden)
FWM_PHASE(phase_layer, layer_kernel, PhaseLayer)
FWM_PHASE(phase_gates, gates_kernel, PhaseGates)
FWM_PHASE(phase_read, read_kernel, PhaseRead)
FWM_PHASE(phase_logits, logits_kernel, PhaseLogits)
template cudaError_t phase_pack(const PhasePack&, float*, cudaStream_t);
template cudaError_t phase_pack(const PhasePack&, Bf16*, cudaStream_t);

}  // namespace fastwm::cuda
