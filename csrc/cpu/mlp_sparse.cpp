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

void sparse_linear(const SparseLinear& a, float* workspace, int64_t begin, int64_t end) {
  float* values = workspace;
  int32_t* columns = reinterpret_cast<int32_t*>(values + kSparseGroup * a.inputs);
  int32_t counts[kSparseGroup];
  for (int64_t first = begin; first < end; first += kSparseGroup) {
    const int64_t rows = end - first < kSparseGroup ? end - first : kSparseGroup;
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = a.x + (first + r) * a.row_stride;
      if (first + r + 1 < end) {  // rows may lie pages apart
        for (int64_t i = 0; i < a.inputs; i += 16) __builtin_prefetch(x + a.row_stride + i);
      }
      int32_t count = 0;
      for (int64_t k = 0; k < a.inputs; ++k) {
        values[r * a.inputs + count] = x[k];
        columns[r * a.inputs + count] = (int32_t)k;
        count += x[k] != 0.0f;
      }
      counts[r] = count;
    }
    for (int64_t o = 0; o < a.outputs; o += kWide) {
      const int64_t width = a.outputs - o < kWide ? a.outputs - o : kWide;
      const float* strip = a.packed + o * a.inputs;
      for (int64_t r = 0; r < rows; ++r) {
        float edge[kWide] = {};
        for (int64_t i = 0; width < kWide && i < width; ++i) edge[i] = a.bias[o + i];
        Wide sum = load4(width < kWide ? edge : a.bias + o);
        for (int32_t k = 0; k < counts[r]; ++k) {
          const int64_t at = r * a.inputs + k;
          sum = sum + values[at] * load4(strip + columns[at] * kWide);
        }
        float* y = a.y + (first + r) * a.outputs + o;
        store4(width < kWide ? edge : y, sum);
        for (int64_t i = 0; width < kWide && i < width; ++i) y[i] = edge[i];
      }
    }
  }
}

}  // namespace fastwm::FWM_ISA
#endif
