// What softmax kernels share: exponentials of numbers that are not positive, logarithms, a sum.
// All of it is inlined into each instruction set's loops.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "scalars.h"

namespace fastwm {

// exp_floored(x) for x <= 0, but 0 below -87.
FWM_HD float exp_nonpos(float x) {
  const float y = exp_floored(x);
  return x < -87.0f ? 0.0f : y;
}

// log(x) for 0 < x, to 2e-7 relative or absolute, whichever is larger; what lies below the smallest
// normal number counts as it; NaN for NaN. x = 2^e m with m in [sqrt(1/2), sqrt(2)), and with
// s = (m - 1) / (m + 1) log(m) = 2 s + s^3 (2/3 + ...): a division, but half of the multiplications
// of a polynomial in m.
FWM_HD float log_positive(float x) {
  const float clamped = x < 1.17549435e-38f ? 1.17549435e-38f : x;
  uint32_t bits;
  memcpy(&bits, &clamped, 4);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  bits -= static_cast<uint32_t>(exponent) << 23;
  float m;
  memcpy(&m, &bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float p = (0.298714191f * z + 0.399775535f) * z + 0.666667759f;
  const float y = (s * z) * p + (static_cast<float>(exponent) * 0.693147181f + 2.0f * s);
  return x < INFINITY ? y : x;
}

// The sum of 16 lanes as a tree. `reduction(+)` of OpenMP adds them one after the other, which
// takes longer than a row of a hundred numbers; a tree in plain loops goes through memory.
FWM_HD float sum16(const float* lanes) {
#if defined(__GNUC__)
  // Not memcpy, which moves quarters of it through memory.
  typedef float Wide __attribute__((vector_size(64), aligned(4), may_alias));
  const Wide x = *reinterpret_cast<const Wide*>(lanes);
  const auto a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto b =
      __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
#else
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum;
#endif
}

}  // namespace fastwm
