// The RSSM kernels as their binding sees them: plain pointers and sizes, no torch. Everything is
// row-major float32 and (B, T, width) where it has a time axis. Letters: docs/conventions.md.
#pragma once

#include <stdint.h>

#include "cpu/team.h"

namespace fastwm {

struct RssmSizes {
  int64_t batch, time, deter, units, groups, classes, blocks, hidden_layers, post_layers;
  int64_t embed;    // width of the token part of the first posterior layer
  int64_t actions;  // 0: the action's share of the hidden layer is given instead

  int64_t block() const { return deter / blocks; }
  int64_t stoch() const { return groups * classes; }
};

struct RssmLayer {
  const float *weight, *bias, *scale;
};

constexpr int kRssmLayers = 16;  // at most, of hidden and of posterior layers each

struct RssmWeights {
  RssmLayer deter_in, stoch_in, action_in, gru, post_logit;
  RssmLayer hidden[kRssmLayers];  // weight (G, D/G+3U, D/G), then (G, D/G, D/G)
  RssmLayer post[kRssmLayers];    // weight (U, D+E), then (U, U)
};

// (batch, time, width) memory; a time step of 0 keeps only the latest step.
struct RssmView {
  float* data = nullptr;
  int64_t row = 0, step = 0;

  float* at(int64_t b, int64_t t) const { return data + b * row + t * step; }
};

struct RssmScan {
  RssmSizes size;
  RssmWeights weights;
  const float *deter, *stoch;              // (B, D), (B, S*K): before the first step
  int64_t deter_row, stoch_row;            // strides of their rows
  const float *action_part, *token_part;   // (B, T, D), (B, T, U), biases inside; null: the biases
  const float* action;                     // (B, A) where action_part is null, T = 1
  const float* noise;                      // (B, T, S) or null: the mode
  const bool* is_first;                    // (B, T) or null: no resets
  float unimix;
  RssmView out_deter, logits;              // D, S*K
  RssmView inner, gates;                   // 2U, 3D: before norm or gate
  RssmView hidden[kRssmLayers], post[kRssmLayers];
  uint8_t* index8;                         // (B, T, S), one of the two
  int64_t* index64;
  RssmView one_hot;                        // S*K, may be absent
  float* packed;                           // regrouped weights, rssm_packed_floats
  float* workspace;
  int64_t scratch, workspace_step;         // rssm_step: of a worker, see rssm_step_workspace
};

struct RssmScanGrad {
  RssmSizes size;
  RssmWeights weights;
  const float *deter0, *deter, *logits, *inner, *gates;  // as the scan left them
  const float *hidden[kRssmLayers], *post[kRssmLayers];
  const bool* is_first;
  float unimix;
  const float *grad_deter, *grad_logits, *grad_stoch;     // (B, T, ...)
  float *carry;                                           // (B, D): gradient of the first deter
  float *d_logits, *d_inner, *d_gates;                    // like logits, inner, gates
  float *d_hidden[kRssmLayers], *d_post[kRssmLayers];
  float *act_inner, *act_hidden[kRssmLayers], *act_post[kRssmLayers];
  float *scales[2 + 2 * kRssmLayers];  // (B, width): deter_in, stoch_in, hidden..., post...
  float* workspace;
};

constexpr int64_t kRssmGroup = 64;  // rows that rssm_step takes through a step at a time

int64_t rssm_packed_floats(const RssmSizes& size);
int64_t rssm_scan_workspace(const RssmSizes& size);  // floats
int64_t rssm_step_preactivations(const RssmSizes& size);
int64_t rssm_scan_grad_workspace(const RssmSizes& size);
int64_t rssm_phases(const RssmSizes& size);  // for Team, both directions

// What one worker of the team does.
void rssm_pack(const RssmScan& a, Worker worker);
void rssm_scan(const RssmScan& a, Worker worker);  // packs, then runs
// One step (T = 1) of many rows with weights that are packed already: every worker takes groups of
// rows through all layers while they are in cache. Of every worker the workspace holds that of a
// scan of kRssmGroup rows (`scratch` floats), then their pre-activations.
void rssm_step(const RssmScan& a, Worker worker);
void rssm_scan_backward(const RssmScanGrad& a, Worker worker);

// One step's gates: gates (N, 3D) without bias, deter and out (N, D), bias (3D).
struct GruGates {
  const float *gates, *bias, *deter;
  float* out;
  int64_t width, blocks;
};
void gru_gates(const GruGates& a, int64_t begin, int64_t end);

}  // namespace fastwm
