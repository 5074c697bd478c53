// One step of a rollout on CUDA with the library's products, for many rows and weights that were
// regrouped and rounded once per rollout (`packed`).
#pragma once

#include "rssm_library.h"

namespace fastwm {

// Where the weights lie in `packed`, in numbers of type T; all row-major.
struct PackedStep {
  int64_t shared, own, hidden, gru, deter_in, stoch_in, head, logit, total;

  explicit PackedStep(const RssmSizes& n) {
    const int64_t d = n.block(), u = n.units, z = n.stoch();
    shared = 0;                                               // (3U, D): what all blocks share
    own = shared + 3 * u * n.deter;                           // (G, D/G, D/G)
    hidden = own + n.deter * d;                               // the layers after the first
    gru = hidden + (n.hidden_layers - 1) * n.deter * d;
    deter_in = gru + 3 * n.deter * d;
    stoch_in = deter_in + u * n.deter;
    head = stoch_in + u * z;                                  // (U, D), then (U, U)
    logit = head + u * n.deter + (n.post_layers - 1) * u * u;
    total = logit + z * u;
  }
};

template <class T>
void pack_step(const RssmScan& a, Products<T>& memory, T* packed) {
  const RssmSizes& n = a.size;
  const RssmWeights& w = a.weights;
  const PackedStep at(n);
  const int64_t d = n.block(), u = n.units, rows = d + 3 * u, z = n.stoch();
  const float* first = w.hidden[0].weight;
  memory.copy(packed + at.shared, {3 * u, n.blocks, d}, {n.deter, d, 1},
              memory.view(first + d * d, {3 * u, n.blocks, d}, {d, rows * d, 1}));
  memory.copy(packed + at.own, {n.blocks, d * d}, {d * d, 1},
              memory.view(first, {n.blocks, d * d}, {rows * d, 1}));
  auto flat = [&](int64_t to, const float* from, int64_t count) {
    memory.copy(packed + to, {count}, {1}, memory.view(from, {count}, {1}));
  };
  for (int64_t i = 1; i < n.hidden_layers; ++i) {
    flat(at.hidden + (i - 1) * n.deter * d, w.hidden[i].weight, n.deter * d);
  }
  flat(at.gru, w.gru.weight, 3 * n.deter * d);
  flat(at.deter_in, w.deter_in.weight, u * n.deter);
  flat(at.stoch_in, w.stoch_in.weight, u * z);
  flat(at.head, w.post[0].weight, u * n.deter);
  for (int64_t i = 1; i < n.post_layers; ++i) {
    flat(at.head + u * n.deter + (i - 1) * u * u, w.post[i].weight, u * u);
  }
  flat(at.logit, w.post_logit.weight, z * u);
}

// State t + 1 of a trajectory from state t; `a` as rssm_step on the CPU takes it.
template <class T>
class LibraryStep {
 public:
  LibraryStep(const RssmScan& a, const T* packed, const Tensor& like, cudaStream_t stream)
      : a_(a), n_(a.size), at_(n_), d_(n_.block()), u_(n_.units), z_(n_.stoch()), b_(n_.batch),
        packed_(packed), memory_(like), stream_(stream) {}

  void run() {
    const Tensor state = operand(a_.deter, a_.deter_row, n_.deter);
    T* branches = inputs(state);
    T* active = memory_.take(b_ * n_.deter);
    hidden_layers(state, branches, active);
    T* next = memory_.take(b_ * n_.deter);
    T* gates = memory_.take(b_ * 3 * n_.deter);
    Product{grouped(gates, 3 * d_), grouped(active, d_), weights(at_.gru, d_, 3 * d_)}.run();
    FWM_LAUNCH(rssm_gates(
        cuda::RssmGates<T>{b_, n_.deter, n_.blocks, {gates, b_ * 3 * d_, 3 * d_},
                           a_.weights.gru.bias, {}, {a_.deter, a_.deter_row}, {},
                           {a_.out_deter.data, a_.out_deter.row}, next},
        stream_));
    head(memory_.matrix(next, b_, n_.deter));
  }

 private:
  Tensor grouped(const T* data, int64_t width) const {
    return memory_.blocks(data, n_.blocks, b_, width, b_ * width, width);
  }
  Tensor weights(int64_t at, int64_t rows, int64_t columns) const {
    return memory_.blocks(packed_ + at, n_.blocks, rows, columns, rows * columns, columns);
  }

  // Rows of the trajectory as an operand: as they lie, or rounded.
  Tensor operand(const float* data, int64_t row, int64_t width) {
    const Tensor view = memory_.view(data, {b_, width}, {row, 1});
    if constexpr (kScalarType<T> == ScalarType::Float) {
      return view;
    } else {
      T* rounded = memory_.take(b_ * width);
      memory_.copy(rounded, {b_, width}, {width, 1}, view);
      return memory_.matrix(rounded, b_, width);
    }
  }

  T* inputs(const Tensor& state) {
    const RssmWeights& w = a_.weights;
    T *raw = memory_.take(b_ * u_), *latent = memory_.take(b_ * u_);
    Product{memory_.matrix(raw, b_, u_), state,
            memory_.transposed(packed_ + at_.deter_in, u_, n_.deter)}.run();
    Product{memory_.matrix(latent, b_, u_), operand(a_.stoch, a_.stoch_row, z_),
            memory_.transposed(packed_ + at_.stoch_in, u_, z_)}.run();
    cuda::RssmInputs<T> in{};
    in.rows = b_, in.deter = n_.deter, in.units = u_, in.blocks = n_.blocks;
    in.groups = n_.groups, in.classes = n_.classes, in.actions = n_.actions;
    in.from_deter = raw, in.from_deter_row = u_;
    in.from_stoch = latent;
    in.action = {a_.action, n_.actions}, in.action_weight = w.action_in.weight;
    in.deter_in = {w.deter_in.bias, w.deter_in.scale};
    in.stoch_in = {w.stoch_in.bias, w.stoch_in.scale};
    in.action_in = {w.action_in.bias, w.action_in.scale};
    in.inner = {memory_.take_floats(b_ * 3 * u_), 3 * u_};
    in.x = {memory_.take(b_ * 3 * u_), 0, 3 * u_}, in.copies = 1;
    FWM_LAUNCH(rssm_row(cuda::RssmSample<T>{}, in, stream_));
    return in.x.data;
  }

  void hidden_layers(const Tensor& state, const T* branches, T* active) {
    T *shared = memory_.take(b_ * n_.deter), *own = memory_.take(b_ * n_.deter);
    const cuda::Rows pre{memory_.take_floats(b_ * n_.deter), n_.deter};
    const int64_t row = state.stride(0);
    Product{memory_.matrix(shared, b_, n_.deter), memory_.matrix(branches, b_, 3 * u_),
            memory_.matrix(packed_ + at_.shared, 3 * u_, n_.deter)}.run();
    const T* from = static_cast<const T*>(state.data_ptr());
    Product{grouped(own, d_), memory_.blocks(from, n_.blocks, b_, d_, d_, row),
            weights(at_.own, d_, d_)}.run();
    const cuda::Grouped<const T> blocks{own, b_ * d_, d_}, whole{shared, d_, n_.deter};
    for (int64_t i = 0; i < n_.hidden_layers; ++i) {
      const RssmLayer& w = a_.weights.hidden[i];
      if (i > 0) {
        const int64_t at = at_.hidden + (i - 1) * n_.deter * d_;
        Product{grouped(own, d_), grouped(active, d_), weights(at, d_, d_)}.run();
      }
      FWM_LAUNCH(rssm_norm(
          cuda::RssmNorm<T>{b_, n_.blocks, d_, blocks, i == 0 ? whole : cuda::Grouped<const T>{},
                            {w.bias, 0}, pre, w.scale, {active, b_ * d_, d_}},
          stream_));
    }
  }

  void head(const Tensor& state) {
    T *out = memory_.take(b_ * u_), *active = memory_.take(b_ * u_);
    const cuda::Rows pre{memory_.take_floats(b_ * u_), u_};
    for (int64_t i = 0; i < n_.post_layers; ++i) {
      const RssmLayer& w = a_.weights.post[i];
      const T* later = packed_ + at_.head + u_ * n_.deter + (i - 1) * u_ * u_;
      Product{memory_.matrix(out, b_, u_), i == 0 ? state : memory_.matrix(active, b_, u_),
              i == 0 ? memory_.transposed(packed_ + at_.head, u_, n_.deter)
                     : memory_.transposed(later, u_, u_)}.run();
      FWM_LAUNCH(rssm_norm(cuda::RssmNorm<T>{b_, 1, u_, {out, 0, u_}, {}, {w.bias, 0}, pre,
                                             w.scale, {active, 0, u_}}, stream_));
    }
    T* logits = memory_.take(b_ * z_);
    Product{memory_.matrix(logits, b_, z_), memory_.matrix(active, b_, u_),
            memory_.transposed(packed_ + at_.logit, z_, u_)}.run();
    cuda::RssmSample<T> draw{};
    draw.rows = b_, draw.groups = n_.groups, draw.classes = n_.classes, draw.unimix = a_.unimix;
    draw.product = logits, draw.bias = a_.weights.post_logit.bias;
    draw.logits = {memory_.take_floats(b_ * z_), z_};
    draw.one_hot = {a_.one_hot.data, a_.one_hot.row};
    if (a_.noise != nullptr) draw.noise = {a_.noise, n_.groups};
    draw.index = memory_.take_ints(b_ * n_.groups);
    draw.scratch = memory_.take_floats(b_ * n_.groups * (n_.classes | 1));
    FWM_LAUNCH(rssm_row(draw, cuda::RssmInputs<T>{}, stream_));
  }

  const RssmScan& a_;
  const RssmSizes& n_;
  const PackedStep at_;
  const int64_t d_, u_, z_, b_;
  const T* packed_;
  Products<T> memory_;
  const cudaStream_t stream_;
};

}  // namespace fastwm
