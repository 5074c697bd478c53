// A stack of dense layers without gradient: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

#include "cpu/team.h"

namespace fastwm {

constexpr int kMlpLayers = 16;    // at most, the linear output included
constexpr int64_t kMlpGroup = 64;  // rows that go through all layers at a time

struct MlpLayer {
  const float *weight, *bias;  // (out, in), (out)
  const float* scale;          // (out), or null: a linear output without norm and activation
  int64_t inputs, outputs;
};

struct Mlp {
  int64_t count;  // of layers; only the last one may be without a scale
  MlpLayer layers[kMlpLayers];
  const float* x;  // (N, in)
  float *y;        // (N, out)
  float* packed;   // mlp_packed_floats
  bool squash;     // the first layer reads symlog(x)
};

int64_t mlp_packed_floats(const Mlp& a);
int64_t mlp_workspace(const Mlp& a);  // floats of one thread

void mlp_pack(const Mlp& a);
// Rows [begin, end), on weights that are packed.
void mlp(const Mlp& a, float* workspace, int64_t begin, int64_t end);

}  // namespace fastwm
