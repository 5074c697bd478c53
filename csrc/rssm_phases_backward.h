// The backward loop of the posterior sequence on CUDA by phase kernels; see rssm_phases.h.
#pragma once

#include "rssm_phases.h"

namespace fastwm {

template <class T>
class PhaseBackward {
 public:
  PhaseBackward(const RssmScanGrad& a, const Tensor& like, cudaStream_t stream)
      : a_(a), n_(a.size), d_(n_.block()), u_(n_.units), z_(n_.stoch()), b_(n_.batch),
        memory_(like, n_.batch, stream), stream_(stream) {
    pack_weights();
    carried_ = memory_.take_floats(b_ * z_), operand_ = memory_.take_floats(b_ * z_);
    deter_ = norm(a_.inner, 2 * u_, u_), stoch_ = norm(a_.inner + u_, 2 * u_, u_);
    for (int64_t i = 0; i < n_.hidden_layers; ++i) hidden_[i] = norm(a_.hidden[i], n_.deter, n_.deter);
    for (int64_t i = 0; i < n_.post_layers; ++i) post_[i] = norm(a_.post[i], u_, u_);
  }

  void run() {
    start();
    for (int64_t t = n_.time - 1; t >= 0; --t) {
      posterior(t);
      read(t);
      hidden_layers(t);
      inputs(t);
    }
    FWM_LAUNCH(phase_finish(deter(0), b_, u_, stream_));
  }

 private:
  // What a norm needs beside a step: the roots of all rows, and memory between two phases.
  struct Norm {
    const float* root;
    float* e;
    cuda::Partials dots;
  };

  Norm norm(const float* pre, int64_t row, int64_t width) {
    float* root = memory_.take_floats(b_ * n_.time);
    FWM_LAUNCH(phase_roots({pre, row}, b_ * n_.time, width, root, stream_));
    const int64_t blocks = width == n_.deter ? n_.blocks : 1;
    return {root, memory_.take_floats(b_ * width),
            memory_.partials(cuda::phase_panels(blocks, width / blocks), width)};
  }

  void pack_weights() {
    const RssmWeights& w = a_.weights;
    const int64_t g = n_.blocks, rows = d_ + 3 * u_;
    logit_ = memory_.packed(w.post_logit.weight, 1, z_, u_, 0, u_, 1);
    for (int64_t i = 1; i < n_.post_layers; ++i) {
      post_back_[i] = memory_.packed(w.post[i].weight, 1, u_, u_, 0, u_, 1);
    }
    read_ = memory_.panels(g, d_, 2 * u_);
    memory_.pack(read_, {w.post[0].weight, d_, n_.deter + n_.embed, 1, g, d_, u_, 0, 2 * u_, 1, 0});
    memory_.pack(read_, {w.deter_in.weight, d_, n_.deter, 1, g, d_, u_, u_, 2 * u_, 1, 0});
    gru_ = memory_.packed(w.gru.weight, g, 3 * d_, d_, 3 * d_ * d_, 1, 3 * d_);
    for (int64_t i = 1; i < n_.hidden_layers; ++i) {
      hidden_back_[i] = memory_.packed(w.hidden[i].weight, g, d_, d_, d_ * d_, 1, d_);
    }
    own_ = memory_.packed(w.hidden[0].weight, g, d_, d_, rows * d_, 1, d_);
    // Both branches read all blocks: block g of the depth is block g of the weight.
    inner_ = memory_.panels(2, u_, n_.deter);
    for (int64_t branch = 0; branch < 2; ++branch) {
      T* to = inner_ + branch * cuda::phase_panels(1, u_) * n_.deter * cuda::kPhaseColumns;
      for (int64_t i = 0; i < g; ++i) {
        const float* from = w.hidden[0].weight + (i * rows + d_ + branch * u_) * d_;
        memory_.pack(to, {from, 0, 1, d_, 1, u_, d_, i * d_, n_.deter, 1, 0});
      }
    }
    to_stoch_ = memory_.packed(w.stoch_in.weight, 1, u_, z_, 0, z_, 1);
  }

  void start() {
    auto zero = [&](float* data, int64_t count) {
      Tensor all = memory_.view(data, {count}, {1});
      torch::stable::zero_(all);
    };
    zero(a_.carry, b_ * n_.deter);
    zero(a_.scales[0], b_ * u_);
    zero(a_.scales[1], b_ * u_);
    for (int64_t i = 0; i < n_.hidden_layers; ++i) zero(a_.scales[2 + i], b_ * n_.deter);
    for (int64_t i = 0; i < n_.post_layers; ++i) zero(a_.scales[2 + n_.hidden_layers + i], b_ * u_);
  }

  cuda::Flags flags(int64_t t) const { return {a_.is_first + t, n_.time}; }
  cuda::ConstRows seen(const float* data, int64_t t, int64_t width) const {
    return {data + t * width, n_.time * width};
  }
  cuda::Rows rows(float* data, int64_t t, int64_t width) const {
    return {data + t * width, n_.time * width};
  }

  cuda::PhaseNormGrad at(const Norm& norm, int64_t t, const float* pre, const float* scale,
                         float* act, float* scales, float* d_pre, int64_t row) const {
    const int64_t width = norm.dots.width;
    return {seen(pre, t, row), seen(norm.root, t, 1), scale, rows(act, t, row), {scales, width},
            norm.e, norm.dots, rows(d_pre, t, row)};
  }
  cuda::PhaseNormGrad hidden(int64_t i, int64_t t) const {
    return at(hidden_[i], t, a_.hidden[i], a_.weights.hidden[i].scale, a_.act_hidden[i],
              a_.scales[2 + i], a_.d_hidden[i], n_.deter);
  }
  cuda::PhaseNormGrad post(int64_t i, int64_t t) const {
    return at(post_[i], t, a_.post[i], a_.weights.post[i].scale, a_.act_post[i],
              a_.scales[2 + n_.hidden_layers + i], a_.d_post[i], u_);
  }
  cuda::PhaseNormGrad deter(int64_t t) const {
    return at(deter_, t, a_.inner, a_.weights.deter_in.scale, a_.act_inner, a_.scales[0],
              a_.d_inner, 2 * u_);
  }
  cuda::PhaseNormGrad stoch(int64_t t) const {
    return at(stoch_, t, a_.inner + u_, a_.weights.stoch_in.scale, a_.act_inner + u_, a_.scales[1],
              a_.d_inner + u_, 2 * u_);
  }

  void posterior(int64_t t) {
    const float* carried = t + 1 < n_.time ? carried_ : nullptr;
    FWM_LAUNCH(rssm_sample_backward(
        cuda::RssmSampleGrad<float>{b_, n_.groups, n_.classes, a_.unimix, carried,
                                    seen(a_.grad_stoch, t, z_), seen(a_.grad_logits, t, z_),
                                    seen(a_.logits, t, z_), rows(a_.d_logits, t, z_), operand_},
        stream_));
    const int64_t last = n_.post_layers - 1;
    FWM_LAUNCH(phase_back(cuda::PhaseBack{{b_, 1, u_, z_}, {operand_, z_}, post(last, t)}, logit_,
                          stream_));
    for (int64_t i = last; i > 0; --i) {
      FWM_LAUNCH(phase_back_layer(
          cuda::PhaseBackLayer{{b_, 1, u_, u_}, post(i, t), post(i - 1, t)}, post_back_[i],
          stream_));
    }
  }

  void read(int64_t t) {
    const int64_t width = n_.deter;
    cuda::PhaseReadGrad a{};
    a.shape = {b_, n_.blocks, d_, 2 * u_};
    a.post = post(0, t);
    if (t + 1 < n_.time) a.later = deter(t + 1), a.later_first = flags(t + 1);
    a.first = flags(t);
    a.carry = {a_.carry, width};
    a.grad = seen(a_.grad_deter, t, width), a.gates = seen(a_.gates, t, 3 * width);
    a.state = t > 0 ? seen(a_.deter, t - 1, width) : cuda::ConstRows{a_.deter0, width};
    a.d_gates = rows(a_.d_gates, t, 3 * width);
    FWM_LAUNCH(phase_read_grad(a, read_, stream_));
  }

  void hidden_layers(int64_t t) {
    const int64_t last = n_.hidden_layers - 1;
    FWM_LAUNCH(phase_back(
        cuda::PhaseBack{{b_, n_.blocks, d_, 3 * d_}, seen(a_.d_gates, t, 3 * n_.deter),
                        hidden(last, t)},
        gru_, stream_));
    for (int64_t i = last; i > 0; --i) {
      FWM_LAUNCH(phase_back_layer(
          cuda::PhaseBackLayer{{b_, n_.blocks, d_, d_}, hidden(i, t), hidden(i - 1, t)},
          hidden_back_[i], stream_));
    }
  }

  void inputs(int64_t t) {
    FWM_LAUNCH(phase_inputs_grad(
        cuda::PhaseInputsGrad{{b_, n_.blocks, d_, d_}, {b_, 2, u_, n_.deter}, hidden(0, t),
                              deter(t), stoch(t), flags(t), {a_.carry, n_.deter}},
        own_, inner_, stream_));
    FWM_LAUNCH(phase_stoch_grad(
        cuda::PhaseStochGrad{{b_, 1, z_, u_}, stoch(t), flags(t), carried_}, to_stoch_, stream_));
  }

  const RssmScanGrad& a_;
  const RssmSizes& n_;
  const int64_t d_, u_, z_, b_;
  PhaseMemory<T> memory_;
  const cudaStream_t stream_;
  T *logit_, *post_back_[kRssmLayers], *read_, *gru_, *hidden_back_[kRssmLayers], *own_, *inner_;
  T* to_stoch_;
  Norm hidden_[kRssmLayers], post_[kRssmLayers], deter_, stoch_;
  float *carried_, *operand_;
};

}  // namespace fastwm
