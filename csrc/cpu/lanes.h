// Turning small matrices, so that what lies innermost in memory becomes a vector per entry: sums and
// maxima over it then need no shuffles, and nothing waits for a single number.
#pragma once

#include <stdint.h>

#include "scalars.h"

namespace fastwm {

constexpr int kLanes = 16;  // how many rows are turned at a time

#if defined(__GNUC__)
// Read and written as whole vectors: memcpy does it in halves, which the next load must wait for.
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// to[c][r] = from[r][c] for 8 x 8 numbers.
FWM_HD void turn8x8(const float* const* from, float* const* to) {
  Eight a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = *reinterpret_cast<const Eight*>(from[r]);
  for (int r = 0; r < 8; r += 2) {
    b[r] = __builtin_shufflevector(a[r], a[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[r + 1] = __builtin_shufflevector(a[r], a[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int i = 0; i < 2; ++i) {
      a[r + 2 * i] = __builtin_shufflevector(b[r + i], b[r + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[r + 2 * i + 1] =
          __builtin_shufflevector(b[r + i], b[r + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int c = 0; c < 4; ++c) {
    *reinterpret_cast<Eight*>(to[c]) =
        __builtin_shufflevector(a[c], a[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Eight*>(to[c + 4]) =
        __builtin_shufflevector(a[c], a[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#else
FWM_HD void turn8x8(const float* const* from, float* const* to) {
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 8; ++c) to[c][r] = from[r][c];
  }
}
#endif

// Sixteen rows of `count` numbers, `count` apart -> `count` vectors of sixteen.
FWM_HD void turn_rows(const float* x, int count, float (*lanes)[kLanes]) {
  int first = 0;
  for (; first + 8 <= count; first += 8) {
    for (int half = 0; half < kLanes; half += 8) {
      const float* from[8];
      float* to[8];
      for (int i = 0; i < 8; ++i) {
        from[i] = x + (half + i) * count + first;
        to[i] = &lanes[first + i][half];
      }
      turn8x8(from, to);
    }
  }
  for (int c = first; c < count; ++c) {
    for (int i = 0; i < kLanes; ++i) lanes[c][i] = x[i * count + c];
  }
}

// And back.
FWM_HD void turn_rows_back(const float (*lanes)[kLanes], int count, float* x) {
  int first = 0;
  for (; first + 8 <= count; first += 8) {
    for (int half = 0; half < kLanes; half += 8) {
      const float* from[8];
      float* to[8];
      for (int i = 0; i < 8; ++i) {
        from[i] = &lanes[first + i][half];
        to[i] = x + (half + i) * count + first;
      }
      turn8x8(from, to);
    }
  }
  for (int c = first; c < count; ++c) {
    for (int i = 0; i < kLanes; ++i) x[i * count + c] = lanes[c][i];
  }
}

}  // namespace fastwm
