// The product inside every phase: 16 rows times a panel of 16 columns, for 256 threads.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/rssm_phase.h"

namespace fastwm::cuda {

constexpr int kPhaseDepth = 128;  // of rows and panel in shared memory at a time
constexpr int kPhaseWarps = kThreads / 32;

// Where a block of threads works: rows [b0, b0 + 16), one panel.
struct PhaseTile {
  int64_t b0, panel, block, column;
  bool leads;  // the first panel of its block

  __device__ PhaseTile(const PhaseShape& n, int64_t panel_)
      : b0((int64_t)blockIdx.y * kPhaseRows), panel(panel_) {
    const int64_t each = phase_panels(1, n.width);
    block = panel / each;
    column = panel % each * kPhaseColumns;
    leads = column == 0;
  }
};

// This thread's row and column in the output of a tile; j counts through the blocks.
struct Place {
  int64_t b, column, j;
  bool row, valid;

  __device__ Place(const PhaseShape& n, const PhaseTile& at)
      : b(at.b0 + threadIdx.x / 16), column(at.column + threadIdx.x % 16),
        j(at.block * n.width + column), row(b < n.batch), valid(row && column < n.width) {}
};

// Totals of partial sums for the 16 rows of a tile, divided by the width; in shared memory.
__device__ __forceinline__ void phase_means(const Partials& a, const PhaseTile& at, int64_t batch,
                                            float* means) {
  const int row = threadIdx.x / 16, lane = threadIdx.x % 16;
  const int64_t b = at.b0 + row;
  float sum = 0.0f;
  if (b < batch) {
    for (int64_t i = lane; i < a.panels; i += 16) sum += a.data[b * a.panels + i];
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0) means[row] = sum / (float)a.width;
}

// Leaves the sum over the 16 columns of a tile as one partial of its row. Called by all threads.
__device__ __forceinline__ void phase_partial(const Partials& a, const PhaseTile& at,
                                              int64_t panel, int64_t b, bool valid_row,
                                              float value) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  if (threadIdx.x % 16 == 0 && valid_row) a.data[b * a.panels + panel] = value;
}

// sums[p] of thread (row, column) = (threadIdx / 16, threadIdx % 16): load(row, k) times panel p.
// Each warp takes a sixteenth of every 128 numbers of depth; the warps' sums are added in order.
template <int P, class T, class Load>
__device__ __forceinline__ void phase_product(float (&sums)[P], const T* panels, int64_t depth,
                                              const Load& load) {
  __shared__ float x[kPhaseRows][kPhaseDepth + 1];
  __shared__ float w[P][kPhaseDepth][kPhaseColumns];  // then the warps' sums
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 8 * 4, column = lane % 8 * 2;
  float part[P][4][2] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kPhaseDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kPhaseRows * kPhaseDepth; i += kThreads) {
      const int64_t k = k0 + i % kPhaseDepth;
      x[i / kPhaseDepth][i % kPhaseDepth] = k < depth ? load(i / kPhaseDepth, k) : 0.0f;
    }
    for (int p = 0; p < P; ++p) {
      const T* from = panels + (p * depth + k0) * kPhaseColumns;
      for (int i = threadIdx.x; i < kPhaseDepth * kPhaseColumns; i += kThreads) {
        const bool inside = k0 + i / kPhaseColumns < depth;
        w[p][i / kPhaseColumns][i % kPhaseColumns] = inside ? widen(from[i]) : 0.0f;
      }
    }
    __syncthreads();
    constexpr int kSlice = kPhaseDepth / kPhaseWarps;
    for (int k = warp * kSlice; k < (warp + 1) * kSlice; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float value = x[row + r][k];
#pragma unroll
        for (int p = 0; p < P; ++p) {
          part[p][r][0] += value * w[p][k][column];
          part[p][r][1] += value * w[p][k][column + 1];
        }
      }
    }
  }
  __syncthreads();
  static_assert(kPhaseWarps * kPhaseRows == kPhaseDepth, "the warps' sums fit where w was");
#pragma unroll
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < 4; ++r) {
      w[p][warp * kPhaseRows + row + r][column] = part[p][r][0];
      w[p][warp * kPhaseRows + row + r][column + 1] = part[p][r][1];
    }
  }
  __syncthreads();
#pragma unroll
  for (int p = 0; p < P; ++p) {
    sums[p] = 0.0f;
    for (int i = 0; i < kPhaseWarps; ++i) {
      sums[p] += w[p][i * kPhaseRows + threadIdx.x / 16][threadIdx.x % 16];
    }
  }
}

inline dim3 phase_grid(int64_t panels, int64_t batch) {
  return dim3((unsigned)panels, (unsigned)((batch + kPhaseRows - 1) / kPhaseRows));
}

}  // namespace fastwm::cuda
