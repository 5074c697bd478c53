// The forward loop of the posterior sequence on CUDA by phase kernels (cuda/rssm_phase.h): one launch
// per layer instead of a product and a kernel. Same arguments and results as the other loops.
#pragma once

#include "cuda/rssm_phase.h"
#include "rssm_library.h"

namespace fastwm {

// Panels of weights, and the partial sums between phases.
template <class T>
class PhaseMemory : public Products<T> {
 public:
  PhaseMemory(const Tensor& like, int64_t batch, cudaStream_t stream)
      : Products<T>(like), batch_(batch), stream_(stream) {}

  T* panels(int64_t blocks, int64_t width, int64_t depth, int64_t parts = 1) {
    return this->take(cuda::phase_panels(blocks, width) * parts * depth * cuda::kPhaseColumns);
  }
  void pack(T* panels, const cuda::PhasePack& a) const {
    FWM_LAUNCH(phase_pack(a, panels, stream_));
  }
  // A weight whose element (k, column) of a block lies at block * s0 + k * s1 + column * s2.
  T* packed(const float* weight, int64_t blocks, int64_t depth, int64_t width, int64_t s0,
            int64_t s1, int64_t s2) {
    T* to = panels(blocks, width, depth);
    pack(to, {weight, s0, s1, s2, blocks, width, depth, 0, depth, 1, 0});
    return to;
  }
  // Of a row of `width` numbers that `panels` panels make.
  cuda::Partials partials(int64_t panels, int64_t width) {
    return {this->take_floats(batch_ * panels), panels, width};
  }

 private:
  const int64_t batch_;
  const cudaStream_t stream_;
};

template <class T>
class PhaseForward {
 public:
  PhaseForward(const RssmScan& a, const Tensor& like, cudaStream_t stream)
      : a_(a), n_(a.size), d_(n_.block()), u_(n_.units), z_(n_.stoch()), b_(n_.batch),
        memory_(like, n_.batch, stream), stream_(stream) {
    pack_weights();
    x_ = memory_.take_floats(b_ * 2 * u_), own_ = memory_.take_floats(b_ * n_.deter);
    raw_ = memory_.take_floats(b_ * u_), logits_ = memory_.take_floats(b_ * z_);
    from_stoch_ = memory_.take_floats(b_ * u_);
    index_ = memory_.take_ints(b_ * n_.groups);
    scratch_ = memory_.take_floats(b_ * n_.groups * (n_.classes | 1));
    for (int64_t i = 0; i < n_.hidden_layers; ++i) {
      squares_[i] = memory_.partials(cuda::phase_panels(n_.blocks, d_), n_.deter);
    }
    for (int64_t i = 0; i < n_.post_layers; ++i) {
      post_squares_[i] = memory_.partials(cuda::phase_panels(1, u_), u_);
    }
  }

  void run() {
    start();
    for (int64_t t = 0; t < n_.time; ++t) {
      hidden_layers(t);
      FWM_LAUNCH(phase_read(read(state(t + 1), t), read_, stream_));
      posterior(t);
      cuda::RssmInputs<float> next{};
      if (t + 1 < n_.time) next = inputs(t + 1);
      FWM_LAUNCH(rssm_row(sample(t), next, stream_));
    }
  }

 private:
  void pack_weights() {
    const RssmWeights& w = a_.weights;
    const int64_t g = n_.blocks, rows = d_ + 3 * u_;
    hidden_[0] = memory_.packed(w.hidden[0].weight, g, d_ + 2 * u_, d_, rows * d_, d_, 1);
    for (int64_t i = 1; i < n_.hidden_layers; ++i) {
      hidden_[i] = memory_.packed(w.hidden[i].weight, g, d_, d_, d_ * d_, d_, 1);
    }
    gates_ = memory_.panels(g, d_, d_, 3);
    for (int64_t part = 0; part < 3; ++part) {
      memory_.pack(gates_, {w.gru.weight + part * d_, 3 * d_ * d_, 3 * d_, 1, g, d_, d_, 0, d_, 3,
                            part});
    }
    read_ = memory_.panels(2, u_, n_.deter);
    memory_.pack(read_, {w.post[0].weight, 0, 1, n_.deter + n_.embed, 1, u_, n_.deter, 0,
                         n_.deter, 1, 0});
    memory_.pack(read_ + cuda::phase_panels(1, u_) * n_.deter * cuda::kPhaseColumns,
                 {w.deter_in.weight, 0, 1, n_.deter, 1, u_, n_.deter, 0, n_.deter, 1, 0});
    for (int64_t i = 1; i < n_.post_layers; ++i) {
      post_[i] = memory_.packed(w.post[i].weight, 1, u_, u_, 0, 1, u_);
    }
    logit_ = memory_.packed(w.post_logit.weight, 1, u_, z_, 0, 1, u_);
    stoch_rows_ = memory_.take_floats(z_ * u_);
    Tensor rows_view = memory_.view(stoch_rows_, {z_, u_}, {u_, 1});
    torch::stable::copy_(rows_view, memory_.view(w.stoch_in.weight, {z_, u_}, {1, z_}));
  }

  void start() {
    cuda::PhaseRead first = read(state(0), 0);  // its posterior part is overwritten by step 0
    FWM_LAUNCH(phase_read(first, read_, stream_));
    Product{memory_.view(from_stoch_, {b_, u_}, {u_, 1}), memory_.view(a_.stoch, {b_, z_}, {z_, 1}),
            memory_.view(stoch_rows_, {z_, u_}, {u_, 1})}.run();
    cuda::RssmInputs<float> inputs0 = inputs(0);
    inputs0.from_stoch = from_stoch_;
    FWM_LAUNCH(rssm_row(cuda::RssmSample<float>{}, inputs0, stream_));
  }

  cuda::Flags flags(int64_t t) const { return {a_.is_first + t, n_.time}; }
  cuda::Rows rows(const RssmView& view, int64_t t) const { return {view.at(0, t), view.row}; }
  cuda::ConstRows seen(const RssmView& view, int64_t t) const { return {view.at(0, t), view.row}; }
  // The state before step t.
  cuda::ConstRows state(int64_t t) const {
    if (t == 0) return {a_.deter, n_.deter};
    return {a_.out_deter.at(0, t - 1), a_.out_deter.row};
  }

  cuda::RssmInputs<float> inputs(int64_t t) const {
    const RssmWeights& w = a_.weights;
    cuda::RssmInputs<float> in{};
    in.rows = b_, in.deter = n_.deter, in.units = u_, in.blocks = 1;
    in.groups = n_.groups, in.classes = n_.classes;
    in.first = flags(t), in.state = state(t);
    in.from_deter = raw_, in.from_deter_row = u_;
    in.stoch_rows = stoch_rows_, in.index = index_;
    in.deter_in = {w.deter_in.bias, w.deter_in.scale};
    in.stoch_in = {w.stoch_in.bias, w.stoch_in.scale};
    in.inner = rows(a_.inner, t);
    in.x = {x_, 0, 2 * u_}, in.copies = 1;
    in.own = {own_, 0, n_.deter};
    return in;
  }

  void hidden_layers(int64_t t) {
    const RssmWeights& w = a_.weights;
    const cuda::ConstRows given{a_.action_part + t * n_.deter, n_.time * n_.deter};
    FWM_LAUNCH(phase_hidden(
        cuda::PhaseHidden{{b_, n_.blocks, d_, d_ + 2 * u_}, own_, x_, u_, given,
                          rows(a_.hidden[0], t), squares_[0]},
        hidden_[0], stream_));
    for (int64_t i = 1; i < n_.hidden_layers; ++i) {
      FWM_LAUNCH(phase_layer(
          cuda::PhaseLayer{{b_, n_.blocks, d_, d_}, activated_hidden(i - 1, t),
                           {w.hidden[i].bias, 0}, rows(a_.hidden[i], t), squares_[i]},
          hidden_[i], stream_));
    }
    FWM_LAUNCH(phase_gates(
        cuda::PhaseGates{{b_, n_.blocks, d_, d_}, activated_hidden(n_.hidden_layers - 1, t),
                         w.gru.bias, flags(t), state(t), rows(a_.gates, t), rows(a_.out_deter, t)},
        gates_, stream_));
  }

  cuda::PhaseActivated activated_hidden(int64_t i, int64_t t) const {
    return {seen(a_.hidden[i], t), a_.weights.hidden[i].scale, squares_[i]};
  }
  cuda::PhaseActivated activated_post(int64_t i, int64_t t) const {
    return {seen(a_.post[i], t), a_.weights.post[i].scale, post_squares_[i]};
  }

  cuda::PhaseRead read(const cuda::ConstRows& from, int64_t t) const {
    return {{b_, 2, u_, n_.deter}, from, {a_.token_part + t * u_, n_.time * u_},
            rows(a_.post[0], t), post_squares_[0], raw_};
  }

  void posterior(int64_t t) {
    for (int64_t i = 1; i < n_.post_layers; ++i) {
      FWM_LAUNCH(phase_layer(
          cuda::PhaseLayer{{b_, 1, u_, u_}, activated_post(i - 1, t),
                           {a_.weights.post[i].bias, 0}, rows(a_.post[i], t), post_squares_[i]},
          post_[i], stream_));
    }
    FWM_LAUNCH(phase_logits(
        cuda::PhaseLogits{{b_, 1, z_, u_}, activated_post(n_.post_layers - 1, t), logits_}, logit_,
        stream_));
  }

  cuda::RssmSample<float> sample(int64_t t) const {
    cuda::RssmSample<float> out{};
    const int64_t s = n_.groups;
    out.rows = b_, out.groups = s, out.classes = n_.classes, out.unimix = a_.unimix;
    out.product = logits_, out.bias = a_.weights.post_logit.bias;
    out.logits = rows(a_.logits, t);
    if (a_.noise != nullptr) out.noise = {a_.noise + t * s, n_.time * s};
    out.index = index_, out.index_row = n_.time * s;
    if (a_.index8 != nullptr) out.index8 = a_.index8 + t * s;
    if (a_.index64 != nullptr) out.index64 = a_.index64 + t * s;
    out.scratch = scratch_;
    return out;
  }

  const RssmScan& a_;
  const RssmSizes& n_;
  const int64_t d_, u_, z_, b_;
  PhaseMemory<T> memory_;
  const cudaStream_t stream_;
  T *hidden_[kRssmLayers], *post_[kRssmLayers], *gates_, *read_, *logit_;
  cuda::Partials squares_[kRssmLayers], post_squares_[kRssmLayers];
  float *stoch_rows_, *x_, *own_, *raw_, *logits_, *from_stoch_, *scratch_;
  int32_t* index_;
};

}  // namespace fastwm
