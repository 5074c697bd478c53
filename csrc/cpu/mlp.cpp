// Layers of silu(rms(Linear)) and a linear output, on weights that were packed once: a group of rows
// goes through all layers while it is in cache.
#ifndef FWM_ISA
#include "cpu/mlp.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/mlp.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void mlp_pack(const Mlp& a) { FWM_CALL(mlp_pack)(a); }

void mlp(const Mlp& a, float* workspace, int64_t begin, int64_t end) {
  FWM_CALL(mlp)(a, workspace, begin, end);
}

// Panels are at most 32 wide; their padding is counted for that width.
int64_t mlp_packed_floats(const Mlp& a) {
  int64_t floats = 16;
  for (int64_t i = 0; i < a.count; ++i) {
    floats += (a.layers[i].outputs + 31) / 32 * 32 * a.layers[i].inputs + 16;
  }
  return floats;
}

int64_t mlp_workspace(const Mlp& a) {
  int64_t widest = a.layers[0].inputs;
  for (int64_t i = 0; i < a.count; ++i) {
    widest = a.layers[i].outputs > widest ? a.layers[i].outputs : widest;
  }
  return 2 * kMlpGroup * (widest + 32) + 32;
}

}  // namespace fastwm

#else

#include "cpu/rssm_body.h"

namespace fastwm::FWM_ISA {
namespace {

FWM_INLINE void place_layers(const Mlp& a, Packed* packed) {
  Arena arena{a.packed};
  for (int64_t i = 0; i < a.count; ++i) {
    packed[i].place(arena, 1, a.layers[i].outputs, a.layers[i].inputs);
  }
}

}  // namespace

void mlp_pack(const Mlp& a) {
  Packed packed[kMlpLayers];
  place_layers(a, packed);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t inputs = a.layers[i].inputs;
    for (int64_t j = 0; j < packed[i].count(); ++j) {
      const float* source = a.layers[i].weight + packed[i].column(j) * inputs;
      pack(packed[i].panel(j), 0, inputs, packed[i].width(j), source, inputs, 1);
    }
  }
}

void mlp(const Mlp& a, float* workspace, int64_t begin, int64_t end) {
  Packed packed[kMlpLayers];
  place_layers(a, packed);
  const int64_t inputs = a.layers[0].inputs, outputs = a.layers[a.count - 1].outputs;
  for (int64_t first = begin; first < end; first += kMlpGroup) {
    const int64_t rows = end - first < kMlpGroup ? end - first : kMlpGroup;
    float *before = workspace, *after = workspace + mlp_workspace(a) / 2;
    Part from{a.x + first * inputs, inputs, inputs};
    if (a.squash) {
      for (int64_t b = 0; b < rows; ++b) {
        const float* x = from.x + b * inputs;
        float* y = before + b * padded(inputs);
#pragma omp simd
        for (int64_t i = 0; i < inputs; ++i) y[i] = symlog(x[i]);
      }
      from = Part{before, padded(inputs), inputs};
    }
    for (int64_t i = 0; i < a.count; ++i) {
      const MlpLayer& layer = a.layers[i];
      const bool last = i + 1 == a.count;
      float* y = last ? a.y + first * outputs : after;
      const int64_t row = last ? outputs : padded(layer.outputs);
      for (int64_t j = 0; j < packed[i].count(); ++j) {
        const int64_t column = packed[i].column(j);
        const Target to{layer.bias + column, 0, y + column, row, packed[i].width(j)};
        product(packed[i].panel(j), from, kNone, to, 0, rows);
      }
      for (int64_t b = 0; b < rows && layer.scale != nullptr; ++b) {
        activate(y + b * row, layer.scale, layer.outputs, y + b * row);
      }
      from = Part{y, row, layer.outputs};
      float* spare = before;
      before = after, after = spare;
    }
  }
}

}  // namespace fastwm::FWM_ISA
#endif
