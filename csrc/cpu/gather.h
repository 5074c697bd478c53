// Windows of consecutive rows out of ring buffers: plain pointers and sizes, see kernels.h.
#pragma once

#include <stdint.h>

#include "scalars.h"

namespace fastwm {

// What all rings of a call share. Row n of an env lies in slot n % length.
struct GatherFrom {
  const int64_t* ids;  // (B, 2): env, row
  int64_t batch, envs, length;
};
// out[b, t] = ring[env, (row + offset + t) % length]
struct GatherRing {
  const uint8_t* ring;  // (N, L, record)
  uint8_t* out;         // (B, rows, record) elements
  int64_t record;       // bytes of a row in the ring
  int64_t offset;       // in [0, length)
  int64_t rows;         // in [1, length]
  int kind;             // 0 as stored; bytes divided by 255: 1 float32, 2 bfloat16
};

// Where a window begins in its env's ring.
FWM_HD int64_t gather_slot(const GatherFrom& from, const GatherRing& ring, int64_t row) {
  return (row % from.length + from.length + ring.offset) % from.length;
}

// The windows [begin, end); every env must be in [0, envs).
void gather_windows(const GatherFrom& from, const GatherRing& ring, int64_t begin, int64_t end);

}  // namespace fastwm
