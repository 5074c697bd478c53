// The gates of the block GRU for any number of rows: the pointwise part of a single step. Bound by
// memory: 5 floats of D read or written per row.
#ifndef FWM_ISA
#include "cpu/rssm.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/rssm_step.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void gru_gates(const GruGates& a, int64_t begin, int64_t end) { FWM_CALL(gru_gates)(a, begin, end); }

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

void gru_gates(const GruGates& a, int64_t begin, int64_t end) {
  const int64_t d = a.width / a.blocks;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < a.blocks; ++g) {
      const float* gates = a.gates + row * 3 * a.width + 3 * g * d;
      const float* bias = a.bias + 3 * g * d;
      const float* deter = a.deter + row * a.width + g * d;
      float* out = a.out + row * a.width + g * d;
#pragma omp simd
      for (int64_t k = 0; k < d; ++k) {
        out[k] = gru_gate(gates[k] + bias[k], gates[d + k] + bias[d + k],
                          gates[2 * d + k] + bias[2 * d + k], deter[k]);
      }
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
