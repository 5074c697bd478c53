// A window is one run of memory, or two where it passes the end of the ring. Bound by memory: a read
// and a write of every byte.
#ifndef FWM_ISA
#include <string.h>

#include "bf16.h"
#include "cpu/gather.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/gather.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

namespace {

// `bytes` of the ring to the elements from `at` on.
void copy_run(const GatherRing& ring, const uint8_t* run, int64_t at, int64_t bytes) {
  if (ring.kind == 0) {
    if (bytes > 0) memcpy(ring.out + at, run, static_cast<size_t>(bytes));
  } else if (ring.kind == 1) {
    FWM_CALL(unit_floats)(run, reinterpret_cast<float*>(ring.out) + at, bytes);
  } else {
    FWM_CALL(unit_bf16)(run, reinterpret_cast<Bf16*>(ring.out) + at, bytes);
  }
}

}  // namespace

void gather_windows(const GatherFrom& from, const GatherRing& ring, int64_t begin, int64_t end) {
  const int64_t window = ring.rows * ring.record;
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* env = ring.ring + from.ids[2 * b] * from.length * ring.record;
    const int64_t slot = gather_slot(from, ring, from.ids[2 * b + 1]);
    const int64_t head = (from.length - slot) * ring.record;
    const int64_t first = head < window ? head : window;
    copy_run(ring, env + slot * ring.record, b * window, first);
    copy_run(ring, env, b * window + first, window - first);
  }
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

void unit_floats(const uint8_t* x, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = unit_byte(x[i]);
}

void unit_bf16(const uint8_t* x, Bf16* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(unit_byte(x[i]), out[i]);
}

}  // namespace fastwm::FWM_ISA

#endif
