// A stack of dense layers without gradient: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

#include "cpu/team.h"

namespace fastwm {

constexpr int kMlpLayers = 16;     // at most, the linear output included
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
  float* y;        // (N, out)
  float* packed;   // mlp_packed_floats
  bool squash;     // the first layer reads symlog(x)
};

int64_t mlp_packed_floats(const Mlp& a);
int64_t mlp_workspace(const Mlp& a);  // floats of one thread

void mlp_pack(const Mlp& a);
// Rows [begin, end), on weights that are packed.
void mlp(const Mlp& a, float* workspace, int64_t begin, int64_t end);

// y = x W^T + b where nearly all of x is zero, as in one-hots: the rows of W^T of what is not zero
// are looked up and added.
struct SparseLinear {
  int64_t inputs, outputs;
  const float *weight, *bias;  // (out, in), (out)
  const float* x;              // (N, in), row_stride apart
  int64_t row_stride;
  float* y;       // (N, out)
  float* packed;  // sparse_packed_floats
};
constexpr int64_t kSparseGroup = 64;  // rows that pass together
inline int64_t sparse_packed_floats(int64_t inputs, int64_t outputs) {
  return inputs * ((outputs + 63) / 64 * 64) + 16;
}
// Of every row the places and values of what is not zero.
inline int64_t sparse_workspace(int64_t inputs) { return 2 * (kSparseGroup + 1) * inputs + 16; }

void sparse_pack(const SparseLinear& a);
void sparse_linear(const SparseLinear& a, float* workspace, int64_t begin, int64_t end);

// The gradient of the weight, (out, in): sums of rows of grad_y, which go where x is not zero.
struct SparseLinearGrad {
  int64_t inputs, outputs;
  const float *x, *grad_y;  // (N, in), row_stride apart; (N, out)
  int64_t row_stride;
};
// Adds the rows' part to `sums` (sparse_packed_floats), which sparse_unpack turns.
void sparse_backward(const SparseLinearGrad& a, float* workspace, float* sums, int64_t begin,
                     int64_t end);
void sparse_unpack(const float* sums, int64_t inputs, int64_t outputs, float* grad_weight);

}  // namespace fastwm
