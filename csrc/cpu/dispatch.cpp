// Chooses the instruction set once, when the library loads.
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace fastwm {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

int supported_level() {
#if FWM_MULTI_ISA
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

int choose_level() {
  const int best = supported_level();
  const char* wanted = getenv("FASTWM_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  for (int level = 0; level < best; ++level) {
    if (strcmp(wanted, kNames[level]) == 0) return level;
  }
  return best;
}

}  // namespace

const int cpu_level = choose_level();

const char* cpu_capability() { return kNames[cpu_level]; }

}  // namespace fastwm
