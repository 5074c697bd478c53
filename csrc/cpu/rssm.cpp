// The posterior sequence, forward: seven phases a step, of which four are products with weights
// that were packed once per call. What a step needs of tokens and actions is already summed up in
// token_part and action_part.
#ifndef FWM_ISA
#include "cpu/rssm.h"
#include "cpu/lanes.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/rssm.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void rssm_pack(const RssmScan& a, Worker worker) { FWM_CALL(rssm_pack)(a, worker); }
void rssm_scan(const RssmScan& a, Worker worker) { FWM_CALL(rssm_scan)(a, worker); }
void rssm_step(const RssmScan& a, Worker worker) { FWM_CALL(rssm_step)(a, worker); }

// Panels are at most 32 wide; their padding is counted for that width.
int64_t rssm_panels(int64_t blocks, int64_t out, int64_t depth) {
  return blocks * ((out + 31) / 32 * 32) * depth + 16;
}

int64_t rssm_packed_floats(const RssmSizes& n) {
  const int64_t d = n.block(), u = n.units, z = n.stoch();
  return rssm_panels(n.blocks, d, d + 3 * u) + (n.hidden_layers - 1) * rssm_panels(n.blocks, d, d) +
         rssm_panels(3 * n.blocks, d, d) + rssm_panels(2, u, n.deter) +
         (n.post_layers - 1) * rssm_panels(1, u, u) + rssm_panels(1, z, u) + (z + n.actions) * u +
         64;
}

int64_t rssm_scan_workspace(const RssmSizes& n) {
  return n.batch * (2 * n.deter + 5 * n.units + n.stoch() + n.groups + 160) + 256;
}

int64_t rssm_step_preactivations(const RssmSizes& n) {
  return kRssmGroup * (n.stoch() + (3 + n.hidden_layers) * n.deter + (3 + n.post_layers) * n.units +
                       32 * (3 + n.hidden_layers + n.post_layers)) +
         64;
}

int64_t rssm_phases(const RssmSizes& n) {
  const int64_t layers = 2 * (n.hidden_layers + n.post_layers);
  return 24 + layers + n.time * (10 + layers);
}

}  // namespace fastwm

#else

#include "cpu/rssm_body.h"
#include "cpu/rssm_draw.h"

namespace fastwm::FWM_ISA {
namespace {

struct Forward {
  const RssmScan& a;
  const RssmSizes& n;
  Worker& worker;
  const int64_t d, u, z, inputs;  // D/G, U, S*K, width of all input branches: 2U or 3U
  const int64_t dw, uw, xw;       // row strides of our own buffers: D, U, inputs, padded
  const Items items;
  Packed hidden[kRssmLayers], post[kRssmLayers], gru, from_deter, logit;
  float *stoch_rows, *action_rows;  // (S*K, U), (A, U): input weights by input
  float *deter, *raw, *x, *h, *o, *e;
  int32_t* index;

  FWM_INLINE Forward(const RssmScan& a_, Worker& worker_)
      : a(a_),
        n(a.size),
        worker(worker_),
        d(n.block()),
        u(n.units),
        z(n.stoch()),
        inputs((n.actions > 0 ? 3 : 2) * u),
        dw(padded(n.deter)),
        uw(padded(u)),
        xw(padded(inputs)),
        items(n.batch) {
    Arena arena{a.packed};
    hidden[0].place(arena, n.blocks, d, d + inputs);
    for (int64_t i = 1; i < n.hidden_layers; ++i) hidden[i].place(arena, n.blocks, d, d);
    for (int64_t i = 1; i < n.post_layers; ++i) post[i].place(arena, 1, u, u);
    gru.place(arena, 3 * n.blocks, d, d);  // block 3g + gate
    from_deter.place(arena, 2, u, n.deter);
    logit.place(arena, 1, z, u);
    stoch_rows = arena.take(z * u);
    action_rows = arena.take(n.actions * u);
    arena.next = a.workspace;
    deter = arena.take(n.batch * dw);
    raw = arena.take(n.batch * u);
    x = arena.take(n.batch * xw);
    h = arena.take(n.batch * dw);
    o = arena.take(n.batch * uw);
    e = arena.take(n.batch * z);
    index = reinterpret_cast<int32_t*>(arena.take(n.batch * n.groups));
  }

  void pack_weights() {
    const RssmWeights& w = a.weights;
    for (int64_t i = 0; i < n.hidden_layers; ++i) {
      const Packed& p = hidden[i];
      const int64_t rows = i == 0 ? d + 3 * u : d;
      worker.run(p.count(), [&](int64_t j) {
        const float* source = w.hidden[i].weight + p.block(j) * rows * d + p.column(j);
        pack(p.panel(j), 0, p.depth, p.width(j), source, 1, d);
      });
    }
    worker.run(gru.count(), [&](int64_t j) {
      const float* source = w.gru.weight + gru.block(j) / 3 * d * 3 * d + gru.block(j) % 3 * d;
      pack(gru.panel(j), 0, d, gru.width(j), source + gru.column(j), 1, 3 * d);
    });
    worker.run(from_deter.count(), [&](int64_t j) {
      const int64_t step = from_deter.block(j) == 0 ? n.deter + n.embed : n.deter;
      const float* source = from_deter.block(j) == 0 ? w.post[0].weight : w.deter_in.weight;
      source += from_deter.column(j) * step;
      pack(from_deter.panel(j), 0, n.deter, from_deter.width(j), source, step, 1);
    });
    for (int64_t i = 1; i < n.post_layers; ++i) {
      pack_dense(post[i], w.post[i].weight, u);
    }
    pack_dense(logit, w.post_logit.weight, u);
    worker.run(z, [&](int64_t j) {
      for (int64_t i = 0; i < u; ++i) stoch_rows[j * u + i] = w.stoch_in.weight[i * z + j];
    });
    worker.run(n.actions, [&](int64_t j) {
      const float* source = w.action_in.weight + j;
      for (int64_t i = 0; i < u; ++i) action_rows[j * u + i] = source[i * n.actions];
    });
  }

  FWM_INLINE void pack_dense(const Packed& p, const float* weight, int64_t depth) {
    worker.run(p.count(), [&](int64_t j) {
      pack(p.panel(j), 0, depth, p.width(j), weight + p.column(j) * depth, depth, 1);
    });
  }

  // What step t needs of the state before it: reset, both input branches.
  FWM_INLINE void prepare(int64_t b, int64_t t) {
    const bool first = a.is_first != nullptr && a.is_first[b * n.time + t];
    float *pre = a.inner.at(b, t), *before = deter + b * dw;
    const float *bias = a.weights.deter_in.bias, *from = raw + b * u;
    if (first) {
      for (int64_t i = 0; i < n.deter; ++i) before[i] = 0.0f;
      for (int64_t i = 0; i < u; ++i) pre[i] = bias[i];
    } else {
      for (int64_t i = 0; i < u; ++i) pre[i] = from[i] + bias[i];
    }
    // Rows of what is not zero: of a one-hot those of the chosen classes.
    int32_t* list = reinterpret_cast<int32_t*>(e + b * z);
    const float* stoch = t == 0 ? a.stoch + b * a.stoch_row : nullptr;
    int64_t count = 0;
    for (int64_t j = 0; t == 0 && b + 1 < n.batch && j < z; j += 16) {
      __builtin_prefetch(stoch + a.stoch_row + j);
    }
    for (int64_t j = 0; !first && t == 0 && j < z; ++j) {
      list[count] = (int32_t)j;
      count += stoch[j] != 0.0f;
    }
    for (int64_t s = 0; !first && t > 0 && s < n.groups; ++s) {
      list[count++] = (int32_t)(s * n.classes) + index[b * n.groups + s];
    }
    add_rows(pre + u, a.weights.stoch_in.bias, stoch_rows, u, list, count, stoch);
    activate(pre, a.weights.deter_in.scale, u, x + b * xw);
    activate(pre + u, a.weights.stoch_in.scale, u, x + b * xw + u);
    if (n.actions == 0) return;
    const float* action = a.action + b * n.actions;
    pre += 2 * u;
    for (int64_t i = 0; i < u; ++i) pre[i] = a.weights.action_in.bias[i];
    for (int64_t j = 0; j < n.actions; ++j) {
      add_row(pre, action_rows + j * u, bounded(action[j]));
    }
    activate(pre, a.weights.action_in.scale, u, x + b * xw + 2 * u);
  }

  FWM_INLINE void add_row(float* y, const float* w, float factor) const {
    if (factor == 0.0f) return;
#pragma omp simd
    for (int64_t i = 0; i < u; ++i) y[i] += factor * w[i];
  }

  // One product per panel: y(:, block * out + column) = init + x_block times the panel.
  FWM_INLINE void layer(const Packed& w, const float* in, int64_t in_row, int64_t in_block,
                        const Part& shared, const float* init, int64_t init_row, const RssmView& to,
                        int64_t t) {
    worker.run(items.count(w), [&](int64_t i) {
      const int64_t j = items.panel(i), column = w.block(j) * w.out + w.column(j);
      const Part own{in + w.block(j) * in_block, in_row, w.depth - shared.depth};
      const Target target{init + column, init_row, to.at(0, t) + column, to.row, w.width(j)};
      product(w.panel(j), own, shared, target, items.begin(i), items.end(i));
    });
  }

  FWM_INLINE void activate_rows(const RssmView& from, int64_t t, const float* scale, int64_t width,
                                float* to, int64_t to_row) {
    worker.run(n.batch, [&](int64_t b) { activate(from.at(b, t), scale, width, to + b * to_row); });
  }

  void hidden_layers(int64_t t) {
    const RssmLayer* w = a.weights.hidden;
    const Part branches{x, xw, inputs};
    const bool given = a.action_part != nullptr;
    layer(hidden[0], deter, dw, d, branches, given ? a.action_part + t * n.deter : w[0].bias,
          given ? n.time * n.deter : 0, a.hidden[0], t);
    activate_rows(a.hidden[0], t, w[0].scale, n.deter, h, dw);
    for (int64_t i = 1; i < n.hidden_layers; ++i) {
      layer(hidden[i], h, dw, d, kNone, w[i].bias, 0, a.hidden[i], t);
      activate_rows(a.hidden[i], t, w[i].scale, n.deter, h, dw);
    }
  }

  // The gates of `width` units from column `first` of block g, in rows b and b + 1.
  FWM_INLINE void gate_rows(int64_t t, int64_t g, int64_t first, int64_t width, int64_t b,
                            int64_t end) {
    const int64_t column = g * d + first, last = b + 1 < end ? b + 1 : b;
    const float* x = a.gates.at(b, t) + 2 * g * d + column;
    const float* y = a.gates.at(last, t) + 2 * g * d + column;
    float *state = deter + b * dw + column, *next = deter + last * dw + column;
    float *out = a.out_deter.at(b, t) + column, *out_next = a.out_deter.at(last, t) + column;
    if (width == kPanel) {
      const Wide fresh = gru_gate(load2(x, y), load2(x + d, y + d), load2(x + 2 * d, y + 2 * d),
                                  load2(state, next));
      store2(state, next, fresh);
      store2(out, out_next, fresh);
      return;
    }
    for (int64_t k = 0; k < width; ++k) {
      out[k] = state[k] = gru_gate(x[k], x[d + k], x[2 * d + k], state[k]);
    }
    for (int64_t k = 0; last > b && k < width; ++k) {
      out_next[k] = next[k] = gru_gate(y[k], y[d + k], y[2 * d + k], next[k]);
    }
  }

  // Three products for the same units, then the gates on what is still in cache.
  void gates(int64_t t) {
    const int64_t panels = gru.panels, count = n.blocks * panels * items.chunks;
    worker.run(count, [&](int64_t i) {
      const int64_t j = items.panel(i), g = j / panels, c = j % panels;
      const Part own{h + g * d, dw, d};
      float* y = a.gates.at(0, t);
      for (int64_t gate = 0; gate < 3; ++gate) {
        const int64_t item = (3 * g + gate) * panels + c;
        const int64_t column = (3 * g + gate) * d + c * kPanel;
        const Target to{a.weights.gru.bias + column, 0, y + column, a.gates.row, gru.width(item)};
        product(gru.panel(item), own, kNone, to, items.begin(i), items.end(i));
      }
      for (int64_t b = items.begin(i); b < items.end(i); b += 2) {
        gate_rows(t, g, c * kPanel, gru.width(c), b, items.end(i));
      }
    });
  }

  // [first posterior layer, next step's deter branch], which read the same state.
  FWM_INLINE void read_deter(int64_t t, bool post_part, bool deter_part) {
    const int64_t skip = post_part ? 0 : from_deter.panels;
    const int64_t stop = deter_part ? from_deter.count() : from_deter.panels;
    worker.run((stop - skip) * items.chunks, [&](int64_t i) {
      const int64_t j = items.panel(i) + skip, c = from_deter.column(j);
      const Part own{deter, dw, n.deter};
      Target to{nullptr, 0, raw + c, u, from_deter.width(j)};
      if (from_deter.block(j) == 0) {
        const bool given = a.token_part != nullptr;
        const float* init = given ? a.token_part + t * u : a.weights.post[0].bias;
        to = {init + c, given ? n.time * u : 0, a.post[0].at(0, t) + c, a.post[0].row,
              from_deter.width(j)};
      }
      product(from_deter.panel(j), own, kNone, to, items.begin(i), items.end(i));
    });
  }

  void posterior(int64_t t) {
    const RssmLayer* w = a.weights.post;
    activate_rows(a.post[0], t, w[0].scale, u, o, uw);
    for (int64_t i = 1; i < n.post_layers; ++i) {
      layer(post[i], o, uw, 0, kNone, w[i].bias, 0, a.post[i], t);
      activate_rows(a.post[i], t, w[i].scale, u, o, uw);
    }
    layer(logit, o, uw, 0, kNone, a.weights.post_logit.bias, 0, a.logits, t);
  }

  FWM_INLINE void sample(int64_t b, int64_t t) {
    const float* logits = a.logits.at(b, t);
    const int64_t at = (b * n.time + t) * n.groups;
    int32_t* chosen = index + b * n.groups;
    if (a.noise != nullptr) {
      draw_row(logits, n.groups, n.classes, a.unimix, a.noise + at, e + b * z, chosen);
    }
    for (int64_t s = 0; a.noise == nullptr && s < n.groups; ++s) {
      chosen[s] = (int32_t)largest(logits + s * n.classes, n.classes);
    }
    float* hot = a.one_hot.data == nullptr ? nullptr : a.one_hot.at(b, t);
    for (int64_t i = 0; hot != nullptr && i < z; ++i) hot[i] = 0.0f;
    for (int64_t s = 0; s < n.groups; ++s) {
      if (a.index8 != nullptr) a.index8[at + s] = (uint8_t)chosen[s];
      if (a.index64 != nullptr) a.index64[at + s] = chosen[s];
      if (hot != nullptr) hot[s * n.classes + chosen[s]] = 1.0f;
    }
  }

  void run() {
    worker.run(n.batch, [&](int64_t b) {
      const float* start = a.deter + b * a.deter_row;
      if (b + 1 < n.batch) {
        for (int64_t i = 0; i < n.deter; i += 16) __builtin_prefetch(start + a.deter_row + i);
      }
      for (int64_t i = 0; i < n.deter; ++i) deter[b * dw + i] = start[i];
    });
    read_deter(0, false, true);
    worker.run(n.batch, [&](int64_t b) { prepare(b, 0); });
    for (int64_t t = 0; t < n.time; ++t) {
      hidden_layers(t);
      gates(t);
      read_deter(t, true, t + 1 < n.time);
      posterior(t);
      worker.run(n.batch, [&](int64_t b) {
        sample(b, t);
        if (t + 1 < n.time) prepare(b, t + 1);
      });
    }
  }
};

}  // namespace

void rssm_pack(const RssmScan& a, Worker worker) { Forward(a, worker).pack_weights(); }

void rssm_scan(const RssmScan& a, Worker worker) {
  Forward forward(a, worker);
  forward.pack_weights();
  forward.run();
}

// The rows [first, first + rows) of `a`, with one worker's memory.
FWM_INLINE RssmScan rows_of(const RssmScan& a, int64_t first, int64_t rows, float* workspace) {
  RssmScan part = a;
  part.size.batch = rows;
  part.deter += first * a.deter_row;
  part.stoch += first * a.stoch_row;
  part.action += first * a.size.actions;
  if (a.token_part != nullptr) part.token_part += first * a.size.units;
  if (a.noise != nullptr) part.noise += first * a.size.groups;
  part.out_deter.data += first * a.out_deter.row;
  part.one_hot.data += first * a.one_hot.row;
  part.workspace = workspace;
  return part;
}

void rssm_step(const RssmScan& a, Worker worker) {
  Team alone(1, 0);
  Worker self(alone, 0);
  const RssmSizes& n = a.size;
  worker.run(ceil_div(n.batch, kRssmGroup), [&](int64_t i) {
    const int64_t first = i * kRssmGroup, left = n.batch - first;
    float* memory = a.workspace + worker.id() * a.workspace_step;
    RssmScan part = rows_of(a, first, left < kRssmGroup ? left : kRssmGroup, memory);
    // Pre-activations live behind the workspace of the scan.
    float* next = memory + a.scratch;
    auto view = [&](int64_t width) {
      const RssmView piece{next, padded(width), 0};
      next += kRssmGroup * piece.row;
      return piece;
    };
    part.logits = view(n.stoch());
    part.inner = view(3 * n.units);
    part.gates = view(3 * n.deter);
    for (int64_t k = 0; k < n.hidden_layers; ++k) part.hidden[k] = view(n.deter);
    for (int64_t k = 0; k < n.post_layers; ++k) part.post[k] = view(n.units);
    Forward(part, self).run();
  });
}

}  // namespace fastwm::FWM_ISA
#endif
