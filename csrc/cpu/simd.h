// One source, three instruction sets, chosen at load.
//
// A kernel file csrc/cpu/<stem>.cpp looks like this:
//
//   #ifndef FWM_ISA                  // first pass: everything that is compiled once
//   #include "cpu/kernels.h"
//   #include "cpu/simd.h"
//   #define FWM_SOURCE "cpu/<stem>.cpp"
//   #include "cpu/each_isa.h"        // includes this file once per instruction set
//   namespace fastwm {
//   void thing(const Thing& a, int64_t begin, int64_t end) { FWM_CALL(thing)(a, begin, end); }
//   }
//   #else                            // per instruction set: the loops, and no #include
//   namespace fastwm::FWM_ISA {
//   void thing(const Thing& a, int64_t begin, int64_t end) { ... }
//   }
//   #endif
//
// `#pragma omp simd` (with reduction(...) where needed) marks the loops that must vectorise.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FWM_MULTI_ISA 1
#else
#define FWM_MULTI_ISA 0
#endif

// glibc has vector versions of these in libmvec but shows them to the compiler only under
// -ffast-math, which would break NaN and infinity. Declaring them ourselves gives the speed alone.
// The set below is complete since glibc 2.35; elsewhere the loops call scalar libm.
#if FWM_MULTI_ISA && defined(__GLIBC__)
#if __GLIBC_PREREQ(2, 35)
extern "C" {
__attribute__((__simd__("notinbranch"))) float expf(float) noexcept;
__attribute__((__simd__("notinbranch"))) float logf(float) noexcept;
__attribute__((__simd__("notinbranch"))) float tanhf(float) noexcept;
__attribute__((__simd__("notinbranch"))) float log1pf(float) noexcept;
__attribute__((__simd__("notinbranch"))) float expm1f(float) noexcept;
}
#endif
#endif

#include "scalars.h"

namespace fastwm {

// 0 default (SSE2 or whatever the platform has), 1 avx2 (x86-64-v3), 2 avx512 (x86-64-v4).
// FASTWM_CPU_CAPABILITY=default|avx2|avx512 lowers it; it never exceeds what the CPU can run.
extern const int cpu_level;

template <class F>
F* pick(F* base, F* v3, F* v4) {
  return cpu_level == 2 ? v4 : cpu_level == 1 ? v3 : base;
}

}  // namespace fastwm

#if FWM_MULTI_ISA
#define FWM_CALL(name) ::fastwm::pick(::fastwm::base::name, ::fastwm::v3::name, ::fastwm::v4::name)
#else
#define FWM_CALL(name) ::fastwm::base::name
#endif
