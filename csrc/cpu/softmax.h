// What softmax kernels share: exponentials of numbers that are not positive, and walks over a row.
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

// log(x) for 0 < x, to 1e-7 relative or absolute, whichever is larger; what lies below the smallest
// normal number counts as it; NaN for NaN. x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
FWM_HD float log_positive(float x) {
  const float clamped = x < 1.17549435e-38f ? 1.17549435e-38f : x;
  uint32_t bits;
  memcpy(&bits, &clamped, 4);
  const int32_t shifted = static_cast<int32_t>(bits - 0x3f3504f3u);
  const int32_t exponent = shifted >> 23;
  bits -= static_cast<uint32_t>(exponent) << 23;
  float mantissa;
  memcpy(&mantissa, &bits, 4);
  const float f = mantissa - 1.0f, e = static_cast<float>(exponent), square = f * f;
  float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float low = f * square * p + e * -2.12194440e-4f - 0.5f * square;
  const float y = (f + low) + e * 0.693359375f;
  return x < INFINITY ? y : x;
}

// The sum of 16 lanes as a tree. `reduction(+)` of OpenMP adds them one after the other, which takes
// longer than a row of a hundred numbers; a tree in plain loops goes through memory.
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

// Rows are walked in whole blocks, because a scalar tail would cost as much as all the rest: the
// last block ends with the row and overlaps its neighbour. Shorter rows take the plain loops.
constexpr int64_t kBlock = 32;

FWM_HD float row_max(const float* x, int64_t count) {
  float largest = -INFINITY;
  if (count < kBlock) {
    for (int64_t v = 0; v < count; ++v) largest = x[v] > largest ? x[v] : largest;
    return largest;
  }
  float lanes[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) lanes[i] = x[count - kBlock + i];
  for (int64_t v = 0; v + kBlock < count; v += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) lanes[i] = x[v + i] > lanes[i] ? x[v + i] : lanes[i];
  }
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < kBlock; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

// The sum of exp(x - shift), which must not be positive; writes them to `out` if it is not null.
FWM_HD float row_exp(const float* x, float shift, float* out, int64_t count) {
  float sum = 0.0f;
  if (count < kBlock) {
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < count; ++v) {
      const float e = exp_nonpos(x[v] - shift);
      if (out != nullptr) out[v] = e;
      sum += e;
    }
    return sum;
  }
  float lanes[kBlock] = {};
  int64_t v = 0;
  for (; v + kBlock <= count; v += kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const float e = exp_nonpos(x[v + i] - shift);
      lanes[i] += e;
      if (out != nullptr) out[v + i] = e;
    }
  }
  const int64_t first = count - kBlock, done = v - first;  // done == kBlock: nothing is left
  if (done < kBlock) {
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      const float e = exp_nonpos(x[first + i] - shift);
      lanes[i] += i < done ? 0.0f : e;
      if (out != nullptr) out[first + i] = e;
    }
  }
  return sum16(lanes) + sum16(lanes + 16);
}

}  // namespace fastwm
