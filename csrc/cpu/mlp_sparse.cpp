// Linear layers of one-hots: where a product would multiply mostly zeros, the weights of the ones
// are looked up. W^T lies in strips of kWide columns, [strip][in][kWide]: a strip stays in cache
// while the rows of a group look up in it, and their sums stay in registers.
#ifndef FWM_ISA
#include <initializer_list>

#include "cpu/mlp.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/mlp_sparse.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void sparse_pack(const SparseLinear& a) { FWM_CALL(sparse_pack)(a); }

void sparse_linear(const SparseLinear& a, float* workspace, int64_t begin, int64_t end) {
  FWM_CALL(sparse_linear)(a, workspace, begin, end);
}

void sparse_backward(const SparseLinearGrad& a, float* workspace, float* sums, int64_t begin,
                     int64_t end) {
  FWM_CALL(sparse_backward)(a, workspace, sums, begin, end);
}

void sparse_unpack(const float* sums, int64_t inputs, int64_t outputs, float* grad_weight) {
  FWM_CALL(sparse_unpack)(sums, inputs, outputs, grad_weight);
}

}  // namespace fastwm

#else

#include "cpu/vec.h"
#include "cpu/wide.h"

namespace fastwm::FWM_ISA {

void sparse_pack(const SparseLinear& a) {
  for (int64_t o = 0; o < a.outputs; ++o) {
    float* to = a.packed + o / kWide * kWide * a.inputs + o % kWide;
    for (int64_t k = 0; k < a.inputs; ++k) to[k * kWide] = a.weight[o * a.inputs + k];
  }
}

namespace {

// What is not zero in a group of rows: row r has entries [starts[r], starts[r + 1]).
struct Entries {
  float* values;
  int32_t* columns;
  int64_t starts[kSparseGroup + 1];
  int64_t inputs;

  FWM_INLINE Entries(float* workspace, int64_t inputs_)
      : values(workspace),
        columns(reinterpret_cast<int32_t*>(workspace + (kSparseGroup + 1) * inputs_)),
        inputs(inputs_) {}

  // `more`: a row follows these, which may lie pages apart.
  FWM_INLINE void find(const float* x, int64_t stride, int64_t rows, bool more) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r, x += stride) {
      for (int64_t i = 0; (more || r + 1 < rows) && i < inputs; i += 16) {
        __builtin_prefetch(x + stride + i);
      }
      starts[r] = count;
      for (int64_t k = 0; k < inputs; ++k) {
        values[count] = x[k];
        columns[count] = (int32_t)k;
        count += x[k] != 0.0f;
      }
    }
    starts[rows] = count;
  }
};

FWM_INLINE Wide load_some(const float* x, int64_t width) {
  if (width >= kWide) return load4(x);
  float edge[kWide] = {};
  for (int64_t i = 0; i < width; ++i) edge[i] = x[i];
  return load4(edge);
}

FWM_INLINE void store_some(float* y, int64_t width, Wide x) {
  if (width >= kWide) return store4(y, x);
  float edge[kWide];
  store4(edge, x);
  for (int64_t i = 0; i < width; ++i) y[i] = edge[i];
}

}  // namespace

void sparse_linear(const SparseLinear& a, float* workspace, int64_t begin, int64_t end) {
  Entries found(workspace, a.inputs);
  for (int64_t first = begin; first < end; first += kSparseGroup) {
    const int64_t rows = end - first < kSparseGroup ? end - first : kSparseGroup;
    found.find(a.x + first * a.row_stride, a.row_stride, rows, first + rows < end);
    for (int64_t o = 0; o < a.outputs; o += kWide) {
      const float* strip = a.packed + o * a.inputs;
      const Wide bias = load_some(a.bias + o, a.outputs - o);
      for (int64_t r = 0; r < rows; ++r) {
        // Two sums: one would wait for itself.
        Wide sum = bias, other{};
        const float* values = found.values;
        const int32_t* columns = found.columns;
        int64_t k = found.starts[r];
        for (; k + 1 < found.starts[r + 1]; k += 2) {
          sum = sum + values[k] * load4(strip + columns[k] * kWide);
          other = other + values[k + 1] * load4(strip + columns[k + 1] * kWide);
        }
        if (k < found.starts[r + 1]) sum = sum + values[k] * load4(strip + columns[k] * kWide);
        store_some(a.y + (first + r) * a.outputs + o, a.outputs - o, sum + other);
      }
    }
  }
}

void sparse_backward(const SparseLinearGrad& a, float* workspace, float* sums, int64_t begin,
                     int64_t end) {
  Entries found(workspace, a.inputs);
  for (int64_t first = begin; first < end; first += kSparseGroup) {
    const int64_t rows = end - first < kSparseGroup ? end - first : kSparseGroup;
    found.find(a.x + first * a.row_stride, a.row_stride, rows, first + rows < end);
    for (int64_t o = 0; o < a.outputs; o += kWide) {
      float* strip = sums + o * a.inputs;
      for (int64_t r = 0; r < rows; ++r) {
        const Wide grad = load_some(a.grad_y + (first + r) * a.outputs + o, a.outputs - o);
        for (int64_t k = found.starts[r]; k < found.starts[r + 1]; ++k) {
          float* sum = strip + found.columns[k] * kWide;
          store4(sum, load4(sum) + found.values[k] * grad);
        }
      }
    }
  }
}

void sparse_unpack(const float* sums, int64_t inputs, int64_t outputs, float* grad_weight) {
  for (int64_t o = 0; o < outputs; ++o) {
    const float* from = sums + o / kWide * kWide * inputs + o % kWide;
    for (int64_t k = 0; k < inputs; ++k) grad_weight[o * inputs + k] = from[k * kWide];
  }
}

}  // namespace fastwm::FWM_ISA
#endif
