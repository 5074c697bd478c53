// The posterior sequence, backward: nine phases a step. It finds the gradient of every
// pre-activation; weight and input gradients are products over all B*T rows afterwards, by the
// caller. It also writes the activations again, which those products need.
#ifndef FWM_ISA
#include "cpu/rssm.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/rssm_backward.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void rssm_scan_backward(const RssmScanGrad& a, Worker worker) {
  FWM_CALL(rssm_scan_backward)(a, worker);
}

int64_t rssm_panels(int64_t blocks, int64_t out, int64_t depth);  // rssm.cpp

int64_t rssm_scan_grad_workspace(const RssmSizes& n) {
  const int64_t d = n.block(), u = n.units, z = n.stoch();
  return n.hidden_layers * rssm_panels(n.blocks, d, d) +
         rssm_panels(n.blocks, d, 3 * d) + rssm_panels(1, 2 * u, n.deter) +
         rssm_panels(n.blocks, d, 2 * u) +
         (n.post_layers - 1) * rssm_panels(1, u, u) + rssm_panels(1, u, z) +
         rssm_panels(1, z, u) + n.batch * (n.deter + 5 * u + 2 * z) + 256;
}

}  // namespace fastwm

#else

#include "cpu/rssm_body.h"

namespace fastwm::FWM_ISA {
namespace {

struct Backward {
  const RssmScanGrad& a;
  const RssmSizes& n;
  Worker& worker;
  const int64_t d, u, z;
  const Items items;
  Packed hidden[kRssmLayers], post[kRssmLayers], gru, from_inner, to_deter, logit, to_stoch;
  float *h, *o, *inner, *tail, *stoch, *e;

  FWM_INLINE Backward(const RssmScanGrad& a_, Worker& worker_)
      : a(a_), n(a.size), worker(worker_), d(n.block()), u(n.units), z(n.stoch()),
        items(n.batch) {
    Arena arena{a.workspace};
    for (int64_t i = 0; i < n.hidden_layers; ++i) hidden[i].place(arena, n.blocks, d, d);
    for (int64_t i = 1; i < n.post_layers; ++i) post[i].place(arena, 1, u, u);
    gru.place(arena, n.blocks, d, 3 * d);
    from_inner.place(arena, 1, 2 * u, n.deter);
    to_deter.place(arena, n.blocks, d, 2 * u);  // first posterior layer, then deter_in
    logit.place(arena, 1, u, z);
    to_stoch.place(arena, 1, z, u);
    h = arena.take(n.batch * n.deter);
    o = arena.take(n.batch * u);
    inner = arena.take(n.batch * 2 * u);
    tail = arena.take(n.batch * 2 * u);  // (2, B, U): d_inner of the step after, zero at resets
    stoch = arena.take(n.batch * z);
    e = arena.take(n.batch * z);
  }

  void pack_weights() {
    const RssmWeights& w = a.weights;
    for (int64_t i = 0; i < n.hidden_layers; ++i) {
      const Packed& p = hidden[i];
      const int64_t rows = i == 0 ? d + 3 * u : d;
      worker.run(p.count(), [&](int64_t j) {
        const float* source = w.hidden[i].weight + (p.block(j) * rows + p.column(j)) * d;
        pack(p.panel(j), 0, d, p.width(j), source, d, 1);
      });
    }
    worker.run(gru.count(), [&](int64_t j) {
      const float* source = w.gru.weight + (gru.block(j) * d + gru.column(j)) * 3 * d;
      pack(gru.panel(j), 0, 3 * d, gru.width(j), source, 3 * d, 1);
    });
    worker.run(from_inner.count(), [&](int64_t j) {
      for (int64_t g = 0; g < n.blocks; ++g) {
        const float* source = w.hidden[0].weight + (g * (d + 3 * u) + d + from_inner.column(j)) * d;
        pack(from_inner.panel(j), g * d, d, from_inner.width(j), source, d, 1);
      }
    });
    worker.run(to_deter.count(), [&](int64_t j) {
      const int64_t column = to_deter.block(j) * d + to_deter.column(j), width = to_deter.width(j);
      const int64_t step = n.deter + n.embed;
      pack(to_deter.panel(j), 0, u, width, w.post[0].weight + column, 1, step);
      pack(to_deter.panel(j), u, u, width, w.deter_in.weight + column, 1, n.deter);
    });
    for (int64_t i = 1; i < n.post_layers; ++i) pack_back(post[i], w.post[i].weight, u);
    pack_back(logit, w.post_logit.weight, u);
    pack_back(to_stoch, w.stoch_in.weight, z);
  }

  // Of a dense weight (depth, out): the layer read backwards.
  FWM_INLINE void pack_back(const Packed& p, const float* weight, int64_t step) {
    worker.run(p.count(), [&](int64_t j) {
      pack(p.panel(j), 0, p.depth, p.width(j), weight + p.column(j), 1, step);
    });
  }

  FWM_INLINE int64_t at(int64_t b, int64_t t, int64_t width) const {
    return (b * n.time + t) * width;
  }

  FWM_INLINE void softmax_backward(int64_t b, int64_t t) {
    const float *logits = a.logits + at(b, t, z), *given = a.grad_logits + at(b, t, z);
    const float *grad = a.grad_stoch + at(b, t, z), *carried = stoch + b * z;
    float *out = a.d_logits + at(b, t, z), *p = e + b * z;
    exponentials(logits, n.groups, n.classes, p);
    for (int64_t s = 0; s < z; s += n.classes) {
      float total = 0.0f, dot = 0.0f;
      for (int64_t k = s; k < s + n.classes; ++k) {
        out[k] = grad[k] + carried[k];
        total += p[k];
        dot += p[k] * out[k];
      }
      dot /= total;
      const float scale = (1.0f - a.unimix) / total;
      for (int64_t k = s; k < s + n.classes; ++k) {
        out[k] = given[k] + scale * p[k] * (out[k] - dot);
      }
    }
  }

  FWM_INLINE void dense(const Packed& w, const float* in, int64_t in_row, float* out,
                        int64_t out_row) {
    worker.run(items.count(w), [&](int64_t i) {
      const int64_t j = items.panel(i);
      const Target to{nullptr, 0, out + w.column(j), out_row, w.width(j)};
      product(w.panel(j), Part{in, in_row, w.depth}, kNone, to, items.begin(i), items.end(i));
    });
  }

  // o or h -> gradient of the pre-activations of one layer, in place in the output.
  FWM_INLINE void through(const float* grad, int64_t grad_row, const float* pre, int64_t t,
                          const RssmLayer& layer, int64_t width, float* d_pre, float* act,
                          float* scales) {
    worker.run(n.batch, [&](int64_t b) {
      activate_backward(grad + b * grad_row, pre + at(b, t, width), layer.scale, width,
                        d_pre + at(b, t, width), act + at(b, t, width), scales + b * width);
    });
  }

  void posterior(int64_t t) {
    const RssmLayer* w = a.weights.post;
    worker.run(n.batch, [&](int64_t b) { softmax_backward(b, t); });
    dense(logit, a.d_logits + t * z, n.time * z, o, u);
    for (int64_t i = n.post_layers - 1; i >= 0; --i) {
      through(o, u, a.post[i], t, w[i], u, a.d_post[i], a.act_post[i],
              a.scales[2 + n.hidden_layers + i]);
      if (i > 0) dense(post[i], a.d_post[i] + t * u, n.time * u, o, u);
    }
  }

  // Gradient of deter_t, then through its gates: d_gates, and the part that skips the step.
  void gates(int64_t t) {
    worker.run(items.count(to_deter), [&](int64_t i) {
      const int64_t j = items.panel(i), g = to_deter.block(j), first = to_deter.column(j);
      const int64_t column = g * d + first, width = to_deter.width(j);
      const Part own{a.d_post[0] + t * u, n.time * u, u}, later{tail, u, u};
      const Target to{a.carry + column, n.deter, a.carry + column, n.deter, width};
      product(to_deter.panel(j), own, later, to, items.begin(i), items.end(i));
      for (int64_t b = items.begin(i); b < items.end(i); ++b) {
        const bool reset = a.is_first[b * n.time + t];
        const float* before = t > 0 ? a.deter + at(b, t - 1, n.deter) : a.deter0 + b * n.deter;
        const float* raw = a.gates + at(b, t, 3 * n.deter) + 3 * g * d + first;
        const float* given = a.grad_deter + at(b, t, n.deter) + column;
        float* out = a.d_gates + at(b, t, 3 * n.deter) + 3 * g * d + first;
        float* carry = a.carry + b * n.deter + column;
#pragma omp simd
        for (int64_t k = 0; k < width; ++k) {
          const float grad = carry[k] + given[k];
          const float old = reset ? 0.0f : before[column + k];
          const GruGateGrad back = gru_gate_backward(grad, raw[k], raw[d + k], raw[2 * d + k], old);
          out[k] = back.reset;
          out[d + k] = back.cand;
          out[2 * d + k] = back.update;
          carry[k] = back.deter;
        }
      }
    });
  }

  void hidden_layers(int64_t t) {
    const RssmLayer* w = a.weights.hidden;
    for (int64_t i = n.hidden_layers - 1; i >= 0; --i) {
      const bool last = i == n.hidden_layers - 1;
      const Packed& p = last ? gru : hidden[i + 1];
      const float* from = last ? a.d_gates + 3 * t * n.deter : a.d_hidden[i + 1] + t * n.deter;
      const int64_t row = n.time * (last ? 3 : 1) * n.deter;
      worker.run(items.count(p), [&](int64_t k) {
        const int64_t j = items.panel(k), g = p.block(j);
        const Target to{nullptr, 0, h + g * d + p.column(j), n.deter, p.width(j)};
        product(p.panel(j), Part{from + g * p.depth, row, p.depth}, kNone, to, items.begin(k),
                items.end(k));
      });
      through(h, n.deter, a.hidden[i], t, w[i], n.deter, a.d_hidden[i], a.act_hidden[i],
              a.scales[2 + i]);
    }
  }

  // d_hidden[0] -> both input branches and, added to the carry, the previous deter.
  void inputs(int64_t t) {
    const Packed& own = hidden[0];
    const float* from = a.d_hidden[0] + t * n.deter;
    const int64_t row = n.time * n.deter, wide = items.count(from_inner);
    worker.run(wide + items.count(own), [&](int64_t k) {
      const int64_t i = k < wide ? k : k - wide, j = items.panel(i);
      if (k < wide) {
        const Target to{nullptr, 0, inner + from_inner.column(j), 2 * u, from_inner.width(j)};
        product(from_inner.panel(j), Part{from, row, n.deter}, kNone, to, items.begin(i),
                items.end(i));
      } else {
        float* carry = a.carry + own.block(j) * d + own.column(j);
        const Target to{carry, n.deter, carry, n.deter, own.width(j)};
        product(own.panel(j), Part{from + own.block(j) * d, row, d}, kNone, to, items.begin(i),
                items.end(i));
      }
    });
    worker.run(n.batch, [&](int64_t b) { inner_row(b, t); });
    dense(to_stoch, tail + n.batch * u, u, stoch, z);
  }

  FWM_INLINE void inner_row(int64_t b, int64_t t) {
    const float *pre = a.inner + at(b, t, 2 * u), *grad = inner + b * 2 * u;
    float *out = a.d_inner + at(b, t, 2 * u), *act = a.act_inner + at(b, t, 2 * u);
    activate_backward(grad, pre, a.weights.deter_in.scale, u, out, act, a.scales[0] + b * u);
    activate_backward(grad + u, pre + u, a.weights.stoch_in.scale, u, out + u, act + u,
                      a.scales[1] + b * u);
    const bool reset = a.is_first[b * n.time + t];
    float *to_deter_in = tail + b * u, *to_stoch_in = tail + (n.batch + b) * u;
    for (int64_t i = 0; i < u; ++i) {
      to_deter_in[i] = reset ? 0.0f : out[i];
      to_stoch_in[i] = reset ? 0.0f : out[u + i];
    }
    if (!reset) return;
    float* carry = a.carry + b * n.deter;
    for (int64_t i = 0; i < n.deter; ++i) carry[i] = 0.0f;
  }

  void clear(float* x, int64_t b, int64_t width) const {
    for (int64_t i = 0; i < width; ++i) x[b * width + i] = 0.0f;
  }

  void run() {
    pack_weights();
    worker.run(n.batch, [&](int64_t b) {
      clear(a.carry, b, n.deter);
      clear(stoch, b, z);
      clear(tail, b, u);
      clear(a.scales[0], b, u);
      clear(a.scales[1], b, u);
      for (int64_t i = 0; i < n.hidden_layers; ++i) clear(a.scales[2 + i], b, n.deter);
      for (int64_t i = 0; i < n.post_layers; ++i) clear(a.scales[2 + n.hidden_layers + i], b, u);
    });
    for (int64_t t = n.time - 1; t >= 0; --t) {
      posterior(t);
      gates(t);
      hidden_layers(t);
      inputs(t);
    }
  }
};

}  // namespace

void rssm_scan_backward(const RssmScanGrad& a, Worker worker) { Backward(a, worker).run(); }

}  // namespace fastwm::FWM_ISA
#endif
