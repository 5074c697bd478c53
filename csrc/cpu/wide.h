// Four vectors side by side. A chain like exponential, sigmoid, product waits for itself, and the
// processor looks ahead by some sixty instructions only: one vector after the other such a chain
// takes three times as long as four that are written side by side. Included once per instruction
// set, inside a target region and behind vec.h: no include guard, and no #include but of its like.

namespace fastwm::FWM_ISA {
namespace {

struct Wide {
  Vec v[4];
};
struct WideBits {
  Bits v[4];
};
constexpr int64_t kWide = 4 * kVec;

// clang-format off
#define FWM_FOUR(type, expression)                 \
  type y;                                          \
  for (int i = 0; i < 4; ++i) y.v[i] = expression; \
  return y;
#define FWM_OPERATOR(op)                                                             \
  FWM_INLINE Wide operator op(Wide a, Wide b) { FWM_FOUR(Wide, a.v[i] op b.v[i]) }   \
  FWM_INLINE Wide operator op(Wide a, float b) { FWM_FOUR(Wide, a.v[i] op b) }       \
  FWM_INLINE Wide operator op(float a, Wide b) { FWM_FOUR(Wide, a op b.v[i]) }
FWM_OPERATOR(+)
FWM_OPERATOR(-)
FWM_OPERATOR(*)
FWM_OPERATOR(/)
#undef FWM_OPERATOR

FWM_INLINE Wide operator-(Wide a) { FWM_FOUR(Wide, -a.v[i]) }
FWM_INLINE WideBits operator<(Wide a, float b) { FWM_FOUR(WideBits, a.v[i] < b) }
FWM_INLINE Wide choose(WideBits c, Wide a, Wide b) { FWM_FOUR(Wide, c.v[i] ? a.v[i] : b.v[i]) }
FWM_INLINE Wide choose(WideBits c, float a, Wide b) { FWM_FOUR(Wide, c.v[i] ? a - Vec{} : b.v[i]) }
FWM_INLINE Wide magnitude(Wide x) { FWM_FOUR(Wide, (Vec)((Bits)x.v[i] & 0x7fffffff)) }
// x, which is not negative, with the sign of `like`
FWM_INLINE Wide signed_as(Wide x, Wide like) {
  FWM_FOUR(Wide, (Vec)((Bits)x.v[i] | ((Bits)like.v[i] & (int32_t)0x80000000)))
}
// 2^n from 1.5 * 2^23 + n
FWM_INLINE Wide power_of_two(Wide shifted) {
  FWM_FOUR(Wide, (Vec)(((Bits)shifted.v[i] << 23) + 0x3f800000))
}
// clang-format on
// Two vectors from each of two rows.
FWM_INLINE Wide load2(const float* a, const float* b) {
  return {load(a), load(a + kVec), load(b), load(b + kVec)};
}
FWM_INLINE void store2(float* a, float* b, Wide x) {
  store(a, x.v[0]), store(a + kVec, x.v[1]), store(b, x.v[2]), store(b + kVec, x.v[3]);
}
FWM_INLINE Wide load4(const float* x) { return load2(x, x + 2 * kVec); }
FWM_INLINE void store4(float* x, Wide y) { store2(x, x + 2 * kVec, y); }
#undef FWM_FOUR

// Those of a single number have the same names.
using ::fastwm::exp_floored, ::fastwm::sigmoid, ::fastwm::tanh_gate, ::fastwm::silu;
using ::fastwm::silu_grad, ::fastwm::gru_gate, ::fastwm::gru_gate_backward;
#define FWM_NUMBER Wide
#define FWM_GRAD WideGruGateGrad
#include "formulas.h"
#undef FWM_NUMBER
#undef FWM_GRAD

}  // namespace
}  // namespace fastwm::FWM_ISA
