// Vectors as wide as the instruction set has them, and sums and maxima over rows of them. Included
// once per instruction set (see simd.h), inside a target region: no include guard, and no #include.

#undef FWM_VECTOR_BYTES
#undef FWM_STEPS
#undef FWM_INLINE
#undef FWM_JOIN_
#undef FWM_JOIN
#define FWM_JOIN_(a, b) a##b
#define FWM_JOIN(a, b) FWM_JOIN_(a, b)
// By name: __AVX512F__ and its like do not follow the target pragma in C++.
#define FWM_LEVEL_base 0
#define FWM_LEVEL_v3 1
#define FWM_LEVEL_v4 2
#if FWM_JOIN(FWM_LEVEL_, FWM_ISA) == 2
#define FWM_VECTOR_BYTES 64
#define FWM_STEPS                                                 \
  {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0, \
   -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1}
#elif FWM_JOIN(FWM_LEVEL_, FWM_ISA) == 1
#define FWM_VECTOR_BYTES 32
#define FWM_STEPS {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1}
#else
#define FWM_VECTOR_BYTES 16
#define FWM_STEPS {0, 0, 0, 0, -1, -1, -1, -1}
#endif
#define FWM_INLINE inline __attribute__((always_inline))

namespace fastwm::FWM_ISA {
namespace {

typedef float Vec __attribute__((vector_size(FWM_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(FWM_VECTOR_BYTES), aligned(4), may_alias));
constexpr int64_t kVec = FWM_VECTOR_BYTES / 4;

FWM_INLINE Vec load(const float* x) { return *(const Vec*)x; }
FWM_INLINE void store(float* x, Vec y) { *(Vec*)x = y; }

}  // namespace
}  // namespace fastwm::FWM_ISA
