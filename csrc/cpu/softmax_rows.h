// softmax.h for whole vectors, and walks over rows of them. Included once per instruction set (see
// simd.h), inside a target region and behind vec.h: no include guard, and no #include.

namespace fastwm::FWM_ISA {
namespace {

// All ones in the last `count` lanes.
FWM_INLINE Bits last_lanes(int64_t count) {
  static const int32_t kSteps[2 * kVec] = FWM_STEPS;
  return *(const Bits*)(kSteps + count);
}

// exp_floored of every lane, but 0 below -87: see scalars.h.
FWM_INLINE Vec exp_nonpos(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec f = x * 1.44269504f - (shifted - 12582912.0f);
  Vec p = f * 1.32647261e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  const Bits power = ((Bits)shifted << 23) + 0x3f800000;
  return x < -87.0f ? Vec{} : p * (Vec)power;
}

// log_positive of every lane: see softmax.h.
FWM_INLINE Vec log_positive(Vec x) {
  const Vec clamped = x < 1.17549435e-38f ? 1.17549435e-38f - Vec{} : x;
  const Bits exponent = ((Bits)clamped - 0x3f3504f3) >> 23;
  const Vec m = (Vec)((Bits)clamped - (exponent << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const Vec p = (z * 0.298714191f + 0.399775535f) * z + 0.666667759f;
  const Vec y = (s * z) * p + (__builtin_convertvector(exponent, Vec) * 0.693147181f + s * 2.0f);
  return x < INFINITY ? y : x;
}

// Quarters of 16 bytes, added or compared: GCC keeps these in registers, and loops over lanes not.
#define FWM_QUAD(x, at) __builtin_shufflevector(x, x, at, at + 1, at + 2, at + 3)
#if FWM_VECTOR_BYTES == 64
#define FWM_FOLD(f, x) f(f(FWM_QUAD(x, 0), FWM_QUAD(x, 4)), f(FWM_QUAD(x, 8), FWM_QUAD(x, 12)))
#elif FWM_VECTOR_BYTES == 32
#define FWM_FOLD(f, x) f(FWM_QUAD(x, 0), FWM_QUAD(x, 4))
#else
#define FWM_FOLD(f, x) x
#endif
#define FWM_ADD(a, b) ((a) + (b))
#define FWM_MAX(a, b) ((a) > (b) ? (a) : (b))

FWM_INLINE float lane_sum(Vec x) {
  const auto q = FWM_FOLD(FWM_ADD, x);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

FWM_INLINE int64_t lane_sum(Bits x) {
  const auto q = FWM_FOLD(FWM_ADD, x);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

FWM_INLINE float lane_max(Vec x) {
  const auto q = FWM_FOLD(FWM_MAX, x);
  const float a = FWM_MAX(q[0], q[2]), b = FWM_MAX(q[1], q[3]);
  return FWM_MAX(a, b);
}

// Rows are walked in whole vectors, because a scalar tail would cost as much as all the rest: the
// last vector ends with the row and overlaps its neighbour. Shorter rows take plain loops. What is
// written may therefore not be what is read.

// Calls step(v) for every whole vector, four at a time where there are as many.
#define FWM_ROW_STEPS(count, step)                 \
  int64_t v = 0;                                   \
  for (; v + 4 * kVec <= (count); v += 4 * kVec) { \
    step(v, 0);                                    \
    step(v + kVec, 1);                             \
    step(v + 2 * kVec, 2);                         \
    step(v + 3 * kVec, 3);                         \
  }                                                \
  for (; v + kVec <= (count); v += kVec) step(v, 0);

FWM_INLINE float row_max(const float* x, int64_t count) {
  if (count < kVec) {
    float most = -INFINITY;
    for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }
  Vec most[4];
  most[0] = most[1] = most[2] = most[3] = load(x + count - kVec);
#define FWM_STEP(at, i) most[i] = FWM_MAX(load(x + (at)), most[i])
  FWM_ROW_STEPS(count, FWM_STEP)
#undef FWM_STEP
  const Vec a = FWM_MAX(most[0], most[1]), b = FWM_MAX(most[2], most[3]);
  return lane_max(FWM_MAX(a, b));
}

// The sum of exp(x - shift), which must not be positive; factor times them to `out` if it is not
// null.
FWM_INLINE float row_exp(const float* x, float shift, float factor, float* out, int64_t count) {
  if (count < kVec) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float e = ::fastwm::exp_nonpos(x[i] - shift);
      if (out != nullptr) out[i] = factor * e;
      sum += e;
    }
    return sum;
  }
  Vec sum[4] = {};
  auto one = [&](int64_t at) __attribute__((always_inline)) {
    const Vec e = exp_nonpos(load(x + at) - shift);
    if (out != nullptr) store(out + at, factor * e);
    return e;
  };
#define FWM_STEP(at, i) sum[i] += one(at)
  FWM_ROW_STEPS(count, FWM_STEP)
#undef FWM_STEP
  if (v < count) sum[1] += (Vec)((Bits)one(count - kVec) & last_lanes(count - v));
  return lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// How many numbers of a row are at most `most`.
FWM_INLINE int64_t row_count(const float* x, float most, int64_t count) {
  if (count < kVec) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i] <= most;
    return total;
  }
  Bits passed[4] = {};
#define FWM_STEP(at, i) passed[i] -= load(x + (at)) <= most
  FWM_ROW_STEPS(count, FWM_STEP)
#undef FWM_STEP
  if (v < count) passed[1] -= (load(x + count - kVec) <= most) & last_lanes(count - v);
  return lane_sum((passed[0] + passed[1]) + (passed[2] + passed[3]));
}

#undef FWM_ROW_STEPS
#undef FWM_QUAD
#undef FWM_FOLD
#undef FWM_ADD
#undef FWM_MAX

}  // namespace
}  // namespace fastwm::FWM_ISA
