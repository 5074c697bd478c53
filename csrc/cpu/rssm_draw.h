// Drawing latents, one group of classes after the other or sixteen side by side: one is too short
// to fill vectors. Included once per instruction set, behind rssm_body.h: no include guard, no
// #include.

namespace fastwm::FWM_ISA {
namespace {

// The class where the cumulative mass of (1 - unimix) softmax + unimix / K passes the noise; e are
// the exponentials and become that cumulative mass.
FWM_INLINE int64_t draw(float* e, int64_t classes, float unimix, float noise) {
  float total = 0.0f;
  for (int64_t k = 0; k < classes; ++k) total += e[k];
  const float scale = (1.0f - unimix) / total, floor = unimix / (float)classes;
  float mass = 0.0f;
  for (int64_t k = 0; k < classes; ++k) e[k] = mass += e[k] * scale + floor;
  const float threshold = noise * mass;
  int64_t chosen = 0;
  for (int64_t k = 0; k + 1 < classes; ++k) chosen += e[k] <= threshold;
  return chosen;
}

constexpr int64_t kLaneClasses = 64;  // more are drawn group by group

// The same for kLanes groups: e[k] holds the logits of class k, and is overwritten.
FWM_INLINE void draw_lanes(float (*e)[kLanes], int64_t classes, float unimix, const float* noise,
                           int32_t* chosen) {
  float top[kLanes], total[kLanes] = {}, mass[kLanes] = {}, threshold[kLanes];
  const float floor = unimix / (float)classes;
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) top[i] = e[0][i];
  for (int64_t k = 1; k < classes; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) top[i] = e[k][i] > top[i] ? e[k][i] : top[i];
  }
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      e[k][i] = exp_floored(e[k][i] - top[i]);
      total[i] += e[k][i];
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) total[i] = (1.0f - unimix) / total[i];
  for (int64_t k = 0; k < classes; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) e[k][i] = mass[i] += e[k][i] * total[i] + floor;
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) threshold[i] = noise[i] * mass[i], chosen[i] = 0;
  for (int64_t k = 0; k + 1 < classes; ++k) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) chosen[i] += e[k][i] <= threshold[i];
  }
}

// The classes of all groups of a row; `e` has room for its logits.
FWM_INLINE void draw_row(const float* logits, int64_t groups, int64_t classes, float unimix,
                         const float* noise, float* e, int32_t* chosen) {
  int64_t s = 0;
  if (classes <= kLaneClasses) {
    float lanes[kLaneClasses][kLanes];
    for (; s + kLanes <= groups; s += kLanes) {
      turn_rows(logits + s * classes, (int)classes, lanes);
      draw_lanes(lanes, classes, unimix, noise + s, chosen + s);
    }
  }
  exponentials(logits + s * classes, groups - s, classes, e);
  for (; s < groups; ++s, e += classes) chosen[s] = (int32_t)draw(e, classes, unimix, noise[s]);
}

}  // namespace
}  // namespace fastwm::FWM_ISA
