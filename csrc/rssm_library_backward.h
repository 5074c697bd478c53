// The backward loop of the posterior sequence on CUDA with the library's products; see
// rssm_library.h. Five products and five kernels a step with one hidden and one posterior layer.
#pragma once

#include "rssm_library.h"

namespace fastwm {

template <class T>
class LibraryBackward {
 public:
  LibraryBackward(const RssmScanGrad& a, const Tensor& like, cudaStream_t stream)
      : a_(a), n_(a.size), d_(n_.block()), u_(n_.units), z_(n_.stoch()), memory_(like),
        stream_(stream) {
    allocate_operands();
    set_up_products();
  }

  void run() {
    start();
    for (int64_t t = n_.time - 1; t >= 0; --t) {
      posterior(t);
      read_.run();
      gates(t);
      hidden_layers(t);
      inner_.run();
      inputs(t);
      if (t > 0) to_stoch_.run();
    }
  }

 private:
  void allocate_operands() {
    const int64_t b = n_.batch;
    logits_ = memory_.take(b * z_), carried_ = memory_.take(b * z_);
    post_ = memory_.take(b * u_), post_grad_ = memory_.take(b * u_);
    tail_ = memory_.take(b * 2 * u_);
    state_ = memory_.take(b * n_.deter);
    gates_ = memory_.take(b * 3 * n_.deter);
    hidden_ = memory_.take(b * n_.deter), hidden_grad_ = memory_.take(b * n_.deter);
    wide_ = memory_.take(n_.blocks * b * (d_ + 2 * u_));
    stoch_ = memory_.take(b * u_);
    both_ = memory_.take(2 * u_ * n_.deter);
  }

  // Every weight of the forward pass, read the other way round.
  void set_up_products() {
    const RssmWeights& w = a_.weights;
    const int64_t b = n_.batch, g = n_.blocks, wide = d_ + 2 * u_, rows = d_ + 3 * u_;
    logit_ = {memory_.matrix(post_, b, u_), memory_.matrix(logits_, b, z_),
              memory_.matrix(memory_.operand(w.post_logit.weight, z_ * u_), z_, u_)};
    for (int64_t i = 1; i < n_.post_layers; ++i) {
      const T* weight = memory_.operand(w.post[i].weight, u_ * u_);
      post_products_.push_back({memory_.matrix(post_, b, u_), memory_.matrix(post_grad_, b, u_),
                                memory_.matrix(weight, u_, u_)});
    }
    memory_.copy(both_, {u_, n_.deter}, {n_.deter, 1},
                 memory_.view(w.post[0].weight, {u_, n_.deter}, {n_.deter + n_.embed, 1}));
    memory_.copy(both_ + u_ * n_.deter, {u_ * n_.deter}, {1},
                 memory_.view(w.deter_in.weight, {u_ * n_.deter}, {1}));
    read_ = {memory_.matrix(state_, b, n_.deter), memory_.matrix(tail_, b, 2 * u_),
             memory_.matrix(both_, 2 * u_, n_.deter)};
    const T* gru = memory_.operand(w.gru.weight, g * d_ * 3 * d_);
    products_.push_back({memory_.blocks(hidden_, g, b, d_, b * d_, d_),
                         memory_.blocks(gates_, g, b, 3 * d_, b * 3 * d_, 3 * d_),
                         memory_.blocks_transposed(gru, g, d_, 3 * d_, 3 * d_ * d_, 3 * d_)});
    for (int64_t i = n_.hidden_layers - 1; i > 0; --i) {
      const T* weight = memory_.operand(w.hidden[i].weight, g * d_ * d_);
      products_.push_back({memory_.blocks(hidden_, g, b, d_, b * d_, d_),
                           memory_.blocks(hidden_grad_, g, b, d_, b * d_, d_),
                           memory_.blocks_transposed(weight, g, d_, d_, d_ * d_, d_)});
    }
    const T* first = memory_.operand(w.hidden[0].weight, g * rows * d_);
    inner_ = {memory_.blocks(wide_, g, b, wide, b * wide, wide),
              memory_.blocks(hidden_grad_, g, b, d_, b * d_, d_),
              memory_.blocks_transposed(first, g, wide, d_, rows * d_, d_)};
    to_stoch_ = {memory_.matrix(carried_, b, z_), memory_.matrix(stoch_, b, u_),
                 memory_.matrix(memory_.operand(w.stoch_in.weight, u_ * z_), u_, z_)};
  }

  void start() {
    auto zero = [&](auto* data, int64_t count) {
      Tensor all = memory_.view(data, {count}, {1});
      torch::stable::zero_(all);
    };
    const int64_t b = n_.batch;
    zero(a_.carry, b * n_.deter);
    zero(tail_, b * 2 * u_);
    zero(a_.scales[0], b * u_);
    zero(a_.scales[1], b * u_);
    for (int64_t i = 0; i < n_.hidden_layers; ++i) zero(a_.scales[2 + i], b * n_.deter);
    for (int64_t i = 0; i < n_.post_layers; ++i) zero(a_.scales[2 + n_.hidden_layers + i], b * u_);
  }

  cuda::Flags flags(int64_t t) const { return {a_.is_first + t, n_.time}; }
  cuda::ConstRows read(const float* data, int64_t t, int64_t width) const {
    return {data + t * width, n_.time * width};
  }
  cuda::Rows write(float* data, int64_t t, int64_t width) const {
    return {data + t * width, n_.time * width};
  }

  void posterior(int64_t t) {
    const int64_t b = n_.batch;
    const T* carried = t + 1 < n_.time ? carried_ : nullptr;
    FWM_LAUNCH(rssm_sample_backward(
        cuda::RssmSampleGrad<T>{b, n_.groups, n_.classes, a_.unimix, carried,
                                read(a_.grad_stoch, t, z_), read(a_.grad_logits, t, z_),
                                read(a_.logits, t, z_), write(a_.d_logits, t, z_), logits_},
        stream_));
    logit_.run();
    for (int64_t i = n_.post_layers - 1; i >= 0; --i) {
      const cuda::Grouped<T> operand{i == 0 ? tail_ : post_grad_, 0, i == 0 ? 2 * u_ : u_};
      const int64_t layer = 2 + n_.hidden_layers + i;
      FWM_LAUNCH(rssm_norm_backward(
          cuda::RssmNormGrad<T>{b, 1, u_, {post_, 0, u_}, read(a_.post[i], t, u_),
                                a_.weights.post[i].scale, write(a_.d_post[i], t, u_),
                                write(a_.act_post[i], t, u_), {a_.scales[layer], u_}, operand},
          stream_));
      if (i > 0) post_products_[i - 1].run();
    }
  }

  void gates(int64_t t) {
    const int64_t b = n_.batch, width = n_.deter;
    const cuda::ConstRows before =
        t > 0 ? read(a_.deter, t - 1, width) : cuda::ConstRows{a_.deter0, width};
    FWM_LAUNCH(rssm_gates_backward(
        cuda::RssmGatesGrad<T>{b, width, n_.blocks, state_, read(a_.grad_deter, t, width),
                               read(a_.gates, t, 3 * width), before, flags(t), {a_.carry, width},
                               write(a_.d_gates, t, 3 * width), {gates_, b * 3 * d_, 3 * d_}},
        stream_));
  }

  void hidden_layers(int64_t t) {
    const int64_t b = n_.batch, width = n_.deter, last = n_.hidden_layers - 1;
    for (int64_t i = last; i >= 0; --i) {
      products_[last - i].run();
      FWM_LAUNCH(rssm_norm_backward(
          cuda::RssmNormGrad<T>{b, n_.blocks, d_, {hidden_, b * d_, d_},
                                read(a_.hidden[i], t, width), a_.weights.hidden[i].scale,
                                write(a_.d_hidden[i], t, width), write(a_.act_hidden[i], t, width),
                                {a_.scales[2 + i], width}, {hidden_grad_, b * d_, d_}},
          stream_));
    }
  }

  void inputs(int64_t t) {
    const int64_t b = n_.batch, wide = d_ + 2 * u_;
    FWM_LAUNCH(rssm_inputs_backward(
        cuda::RssmInputsGrad<T>{b, n_.deter, u_, n_.blocks, {wide_, b * wide, wide},
                                read(a_.inner, t, 2 * u_), a_.weights.deter_in.scale,
                                a_.weights.stoch_in.scale, flags(t), write(a_.d_inner, t, 2 * u_),
                                write(a_.act_inner, t, 2 * u_), {a_.scales[0], u_},
                                {a_.scales[1], u_}, {a_.carry, n_.deter}, {tail_ + u_, 0, 2 * u_},
                                {stoch_, 0, u_}},
        stream_));
  }

  const RssmScanGrad& a_;
  const RssmSizes& n_;
  const int64_t d_, u_, z_;
  Products<T> memory_;
  const cudaStream_t stream_;
  // Operands and results of products; tail_ holds [first posterior layer, deter branch of the step
  // after], the readers of one state.
  T *logits_, *carried_, *post_, *post_grad_, *tail_, *state_, *gates_, *hidden_, *hidden_grad_;
  T *wide_, *stoch_, *both_;
  std::vector<Product> products_, post_products_;
  Product logit_, read_, inner_, to_stoch_;
};

}  // namespace fastwm
