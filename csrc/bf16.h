// bfloat16 as its bits, for host and device: rounds to nearest even, NaN stays NaN.
#pragma once

#include <stdint.h>
#include <string.h>

#include "scalars.h"

namespace fastwm {

struct Bf16 {
  uint16_t bits;
};

FWM_HD float widen(float x) { return x; }

FWM_HD float widen(Bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

FWM_HD void narrow(float x, float& out) { out = x; }

FWM_HD void narrow(float x, Bf16& out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = x != x;
  out.bits = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace fastwm
