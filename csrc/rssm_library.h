// The loops of the posterior sequence on CUDA with the library's products: per step and direction
// one product and one kernel for each layer. Same arguments and results as the CPU kernels. Nothing
// is allocated, and nothing waits for the device, between the first step and the last.
#pragma once

#include <vector>

#include "cpu/rssm.h"
#include "cuda/rssm.h"
#include "products.h"

namespace fastwm {

#define FWM_LAUNCH(call) STD_CUDA_CHECK(cuda::call)

template <class T>
class LibraryForward {
 public:
  LibraryForward(const RssmScan& a, const Tensor& like, cudaStream_t stream)
      : a_(a), n_(a.size), d_(n_.block()), u_(n_.units), z_(n_.stoch()), memory_(like),
        stream_(stream) {
    allocate_operands();
    set_up_products();
  }

  void run() {
    start();
    for (int64_t t = 0; t < n_.time; ++t) {
      hidden_layers(t);
      read_.run();  // of the new state: the first posterior layer, the next step's deter branch
      posterior(t);
      logit_.run();
      cuda::RssmInputs<T> next{};
      if (t + 1 < n_.time) next = inputs(t + 1);
      FWM_LAUNCH(rssm_row(sample(t), next, stream_));
    }
  }

 private:
  void allocate_operands() {
    const int64_t b = n_.batch, g = n_.blocks;
    state_ = memory_.take(b * n_.deter);
    wide_ = memory_.take(g * b * (d_ + 2 * u_));
    hidden_ = memory_.take(b * n_.deter), active_ = memory_.take(b * n_.deter);
    gates_ = memory_.take(b * 3 * n_.deter);
    raw_ = memory_.take(b * 2 * u_);
    post_ = memory_.take(b * u_), post_active_ = memory_.take(b * u_);
    logits_ = memory_.take(b * z_);
    stoch_ = memory_.take(b * z_), from_stoch_ = memory_.take(b * u_);
    index_ = memory_.take_ints(b * n_.groups);
    scratch_ = memory_.take_floats(b * n_.groups * (n_.classes | 1));
    both_ = memory_.take(2 * u_ * n_.deter);
    stoch_rows_ = memory_.take(z_ * u_);
  }

  void set_up_products() {
    const RssmWeights& w = a_.weights;
    const int64_t b = n_.batch, g = n_.blocks, wide = d_ + 2 * u_, rows = d_ + 3 * u_;
    const T* first = memory_.operand(w.hidden[0].weight, g * rows * d_);
    products_.push_back({memory_.blocks(hidden_, g, b, d_, b * d_, d_),
                         memory_.blocks(wide_, g, b, wide, b * wide, wide),
                         memory_.blocks(first, g, wide, d_, rows * d_, d_)});
    for (int64_t i = 1; i < n_.hidden_layers; ++i) {
      const T* weight = memory_.operand(w.hidden[i].weight, g * d_ * d_);
      products_.push_back({memory_.blocks(hidden_, g, b, d_, b * d_, d_),
                           memory_.blocks(active_, g, b, d_, b * d_, d_),
                           memory_.blocks(weight, g, d_, d_, d_ * d_, d_)});
    }
    const T* gru = memory_.operand(w.gru.weight, g * d_ * 3 * d_);
    gru_ = {memory_.blocks(gates_, g, b, 3 * d_, b * 3 * d_, 3 * d_),
            memory_.blocks(active_, g, b, d_, b * d_, d_),
            memory_.blocks(gru, g, d_, 3 * d_, 3 * d_ * d_, 3 * d_)};
    memory_.copy(both_, {u_, n_.deter}, {n_.deter, 1},
                 memory_.view(w.post[0].weight, {u_, n_.deter}, {n_.deter + n_.embed, 1}));
    memory_.copy(both_ + u_ * n_.deter, {u_ * n_.deter}, {1},
                 memory_.view(w.deter_in.weight, {u_ * n_.deter}, {1}));
    read_ = {memory_.matrix(raw_, b, 2 * u_), memory_.matrix(state_, b, n_.deter),
             memory_.transposed(both_, 2 * u_, n_.deter)};
    for (int64_t i = 1; i < n_.post_layers; ++i) {
      const T* weight = memory_.operand(w.post[i].weight, u_ * u_);
      post_products_.push_back({memory_.matrix(post_, b, u_), memory_.matrix(post_active_, b, u_),
                                memory_.transposed(weight, u_, u_)});
    }
    const T* logit = memory_.operand(w.post_logit.weight, z_ * u_);
    logit_ = {memory_.matrix(logits_, b, z_), memory_.matrix(post_active_, b, u_),
              memory_.transposed(logit, z_, u_)};
    memory_.copy(stoch_rows_, {z_, u_}, {u_, 1},
                 memory_.view(w.stoch_in.weight, {z_, u_}, {1, z_}));
  }

  // What the first step needs of the state before it, whose latent may be any numbers.
  void start() {
    const int64_t b = n_.batch;
    memory_.copy(state_, {b * n_.deter}, {1}, memory_.view(a_.deter, {b * n_.deter}, {1}));
    memory_.copy(stoch_, {b * z_}, {1}, memory_.view(a_.stoch, {b * z_}, {1}));
    read_.run();
    Product{memory_.matrix(from_stoch_, b, u_), memory_.matrix(stoch_, b, z_),
            memory_.matrix(stoch_rows_, z_, u_)}.run();
    cuda::RssmInputs<T> first = inputs(0);
    first.from_stoch = from_stoch_;
    FWM_LAUNCH(rssm_row(cuda::RssmSample<T>{}, first, stream_));
  }

  cuda::Flags flags(int64_t t) const { return {a_.is_first + t, n_.time}; }
  cuda::Rows rows(const RssmView& view, int64_t t) const { return {view.at(0, t), view.row}; }
  cuda::ConstRows state_before(int64_t t) const {
    if (t == 0) return {a_.deter, n_.deter};
    return {a_.out_deter.at(0, t - 1), a_.out_deter.row};
  }

  cuda::RssmInputs<T> inputs(int64_t t) const {
    const RssmWeights& w = a_.weights;
    const int64_t b = n_.batch, wide = d_ + 2 * u_;
    cuda::RssmInputs<T> in{};
    in.rows = b, in.deter = n_.deter, in.units = u_, in.blocks = n_.blocks;
    in.groups = n_.groups, in.classes = n_.classes;
    in.first = flags(t);
    in.state = state_before(t);
    in.from_deter = raw_ + u_, in.from_deter_row = 2 * u_;
    in.stoch_rows = stoch_rows_, in.index = index_;
    in.deter_in = {w.deter_in.bias, w.deter_in.scale};
    in.stoch_in = {w.stoch_in.bias, w.stoch_in.scale};
    in.inner = rows(a_.inner, t);
    in.x = {wide_ + d_, b * wide, wide}, in.copies = n_.blocks;
    in.own = {wide_, b * wide, wide};
    return in;
  }

  void hidden_layers(int64_t t) {
    const RssmWeights& w = a_.weights;
    const int64_t b = n_.batch;
    for (int64_t i = 0; i < n_.hidden_layers; ++i) {
      products_[i].run();
      const cuda::ConstRows given{a_.action_part + t * n_.deter, n_.time * n_.deter};
      const cuda::ConstRows add = i == 0 ? given : cuda::ConstRows{w.hidden[i].bias, 0};
      FWM_LAUNCH(rssm_norm(cuda::RssmNorm<T>{b, n_.blocks, d_, {hidden_, b * d_, d_}, {}, add,
                                             rows(a_.hidden[i], t), w.hidden[i].scale,
                                             {active_, b * d_, d_}}, stream_));
    }
    gru_.run();
    FWM_LAUNCH(rssm_gates(cuda::RssmGates<T>{b, n_.deter, n_.blocks, {gates_, b * 3 * d_, 3 * d_},
                                             w.gru.bias, flags(t), state_before(t),
                                             rows(a_.gates, t), rows(a_.out_deter, t), state_},
                          stream_));
  }

  void posterior(int64_t t) {
    for (int64_t i = 0; i < n_.post_layers; ++i) {
      if (i > 0) post_products_[i - 1].run();
      const cuda::ConstRows given{a_.token_part + t * u_, n_.time * u_};
      const cuda::ConstRows add = i == 0 ? given : cuda::ConstRows{a_.weights.post[i].bias, 0};
      const cuda::Grouped<const T> in{i == 0 ? raw_ : post_, 0, i == 0 ? 2 * u_ : u_};
      FWM_LAUNCH(rssm_norm(cuda::RssmNorm<T>{n_.batch, 1, u_, in, {}, add, rows(a_.post[i], t),
                                             a_.weights.post[i].scale, {post_active_, 0, u_}},
                           stream_));
    }
  }

  cuda::RssmSample<T> sample(int64_t t) const {
    cuda::RssmSample<T> out{};
    const int64_t s = n_.groups;
    out.rows = n_.batch, out.groups = s, out.classes = n_.classes, out.unimix = a_.unimix;
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
  const int64_t d_, u_, z_;  // D/G, U, S*K
  Products<T> memory_;
  const cudaStream_t stream_;
  // Operands and results of products: (G, B, …) where they have blocks, else (B, …).
  T *state_, *wide_, *hidden_, *active_, *gates_, *raw_, *post_, *post_active_, *logits_, *stoch_;
  T *from_stoch_, *both_, *stoch_rows_;
  int32_t* index_;
  float* scratch_;
  std::vector<Product> products_, post_products_;
  Product gru_, read_, logit_;
};

}  // namespace fastwm
