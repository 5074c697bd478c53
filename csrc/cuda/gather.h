// Windows out of ring buffers on the GPU. All rings of a call go in one launch: the table of them
// travels as a kernel argument, so that nothing is copied and a graph keeps it.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cpu/gather.h"

namespace fastwm::cuda {

constexpr int64_t kPiece = 16384;  // bytes of a ring that a block copies
constexpr int kTableRings = 32;    // of 64 bytes each: half of what fits a kernel's arguments

struct GatherEntry {
  GatherRing ring;
  int64_t first_block;
  int32_t pieces;  // blocks for a window
  int32_t unit;    // bytes that a thread copies at once
};
struct GatherTable {
  GatherFrom from;
  int64_t blocks;
  int32_t rings;
  GatherEntry entry[kTableRings];
};

// Adds a ring, and returns whether there is room for another one.
bool add_ring(GatherTable& table, const GatherRing& ring);
// An env outside of [0, envs) counts as the nearest one inside: to say so would need a wait.
cudaError_t gather_windows(const GatherTable& table, cudaStream_t stream);

}  // namespace fastwm::cuda
