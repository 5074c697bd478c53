// kl_balance for groups of up to kTileClasses classes: sixteen groups at a time are turned round, so
// that every class is a vector over groups. One group by itself is a chain of a maximum, exponentials, a
// sum and logarithms that wait for each other; sixteen side by side keep the units busy.
#ifndef FWM_ISA
#include <string.h>

#include "cpu/lanes.h"
#include "cpu/latent.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#define FWM_SOURCE "cpu/latent_kl.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void kl_tiles(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  FWM_CALL(kl_tiles)(a, out, begin, end);
}

}  // namespace fastwm

#else

namespace fastwm::FWM_ISA {

// How the softmax is mixed with the uniform distribution: p = keep * softmax + share.
struct Mixture {
  int classes;
  float keep, share;
};

// Sixteen distributions over classes: softmax, and the logarithms of the mixed probabilities.
struct Lanes {
  static constexpr int kRoom = kTileClasses + 1;  // not 4096 bytes: stores would hide from loads
  float soft[kRoom][kLanes], logs[kRoom][kLanes];
  float entropy[kLanes];
};

template <bool mixed>
FWM_HD void fill_lanes(const float* x, const Mixture& k, Lanes& side) {
  float largest[kLanes], sum[kLanes] = {}, log_sum[kLanes];
  turn_rows(x, k.classes, side.logs);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) largest[i] = -INFINITY, side.entropy[i] = 0.0f;
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      largest[i] = side.logs[c][i] > largest[i] ? side.logs[c][i] : largest[i];
    }
  }
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float log = side.logs[c][i] - largest[i], soft = exp_nonpos(log);
      side.logs[c][i] = log;
      side.soft[c][i] = soft;
      sum[i] += soft;
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    log_sum[i] = log_positive(sum[i]);
    sum[i] = 1.0f / sum[i];
  }
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float soft = side.soft[c][i] * sum[i], p = k.keep * soft + k.share;
      const float log = mixed ? log_positive(p) : side.logs[c][i] - log_sum[i];
      side.soft[c][i] = soft;
      side.logs[c][i] = log;
      side.entropy[i] -= p * log;
    }
  }
}

FWM_HD void add_lanes(const Lanes& p, const Lanes& q, const Mixture& k, float* kl) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) kl[i] = 0.0f;
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      kl[i] += (k.keep * p.soft[c][i] + k.share) * (p.logs[c][i] - q.logs[c][i]);
    }
  }
}

// The logits' slopes take the place of the softmax: d KL / d post in p, d KL / d prior in q.
template <bool mixed>
FWM_HD void slopes(Lanes& p, Lanes& q, const Mixture& k) {
  float post_dot[kLanes] = {}, prior_dot[kLanes] = {};
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float gap = p.logs[c][i] - q.logs[c][i], kept = k.keep * q.soft[c][i];
      const float ratio = mixed ? kept / (kept + k.share) : 1.0f;
      const float pull = ratio * (k.keep * p.soft[c][i] + k.share);
      p.logs[c][i] = gap;
      q.logs[c][i] = pull;
      post_dot[i] += p.soft[c][i] * gap;
      prior_dot[i] += pull;
    }
  }
  for (int c = 0; c < k.classes; ++c) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      p.soft[c][i] = k.keep * p.soft[c][i] * (p.logs[c][i] - post_dot[i]);
      q.soft[c][i] = q.soft[c][i] * prior_dot[i] - q.logs[c][i];
    }
  }
}

// Sums of the row that is being added up, group after group.
struct Row {
  float sums[3] = {};
  int64_t group = 0, row = 0;
};

// Adds `count` groups; a row that is complete goes to the outputs.
static void finish(const KlBalance& a, const KlOutputs& out, const float (*values)[kLanes],
                   int64_t count, Row& at) {
  const int64_t row_size = a.groups * a.classes;
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < 3; ++v) at.sums[v] += values[v][i];
    if (++at.group < a.groups) continue;
    const bool clipped = at.sums[0] < a.free_nats;
    out.dyn[at.row] = out.rep[at.row] = clipped ? a.free_nats : at.sums[0];
    out.post_entropy[at.row] = at.sums[1];
    out.prior_entropy[at.row] = at.sums[2];
    if (clipped && out.slope_post != nullptr) {
      memset(out.slope_post + at.row * row_size, 0, row_size * sizeof(float));
      memset(out.slope_prior + at.row * row_size, 0, row_size * sizeof(float));
    }
    at = Row{{}, 0, at.row + 1};
  }
}

template <bool mixed>
static void walk(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  const Mixture k{static_cast<int>(a.classes), 1.0f - a.unimix,
                  a.unimix / static_cast<float>(a.classes)};
  Lanes p, q;
  float rest[2][kTileClasses * kLanes], values[3][kLanes];
  Row at{{}, 0, begin};
  const int64_t last = end * a.groups;
  for (int64_t group = begin * a.groups; group < last; group += kLanes) {
    const int64_t start = group * a.classes, count = last - group < kLanes ? last - group : kLanes;
    const bool whole = count == kLanes;
    const float *post = a.post + start, *prior = a.prior + start;
    const size_t bytes = count * a.classes * sizeof(float);
    if (!whole) {  // the last ones: copies, so that nothing is read past the end
      memset(rest, 0, sizeof(rest));
      post = static_cast<float*>(memcpy(rest[0], post, bytes));
      prior = static_cast<float*>(memcpy(rest[1], prior, bytes));
    }
    fill_lanes<mixed>(post, k, p);
    fill_lanes<mixed>(prior, k, q);
    add_lanes(p, q, k, values[0]);
    memcpy(values[1], p.entropy, sizeof(p.entropy));
    memcpy(values[2], q.entropy, sizeof(q.entropy));
    if (out.slope_post != nullptr) {
      slopes<mixed>(p, q, k);
      turn_rows_back(p.soft, k.classes, whole ? out.slope_post + start : rest[0]);
      turn_rows_back(q.soft, k.classes, whole ? out.slope_prior + start : rest[1]);
      if (!whole) {
        memcpy(out.slope_post + start, rest[0], bytes);
        memcpy(out.slope_prior + start, rest[1], bytes);
      }
    }
    finish(a, out, values, count, at);
  }
}

void kl_tiles(const KlBalance& a, const KlOutputs& out, int64_t begin, int64_t end) {
  a.unimix != 0.0f ? walk<true>(a, out, begin, end) : walk<false>(a, out, begin, end);
}

}  // namespace fastwm::FWM_ISA

#endif
