// kl_balance for groups of up to kTileClasses classes: sixteen groups at a time are turned round,
// so that every class is a vector over groups. One group by itself is a chain of a maximum,
// exponentials, a sum and logarithms that wait for each other; sixteen side by side keep the units
// busy.
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

#include "cpu/vec.h"

#include "cpu/softmax_rows.h"

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

// All loops go over the classes of kVec groups at a time, so that what they add up stays in
// registers.
template <bool mixed>
FWM_INLINE void fill_lanes(const float* x, const Mixture& k, Lanes& side) {
  turn_rows(x, k.classes, side.logs);
  for (int i = 0; i < kLanes; i += kVec) {
    Vec largest = Vec{} - INFINITY, sum{}, entropy{};
    for (int c = 0; c < k.classes; ++c) {
      const Vec logit = load(&side.logs[c][i]);
      largest = logit > largest ? logit : largest;
    }
    for (int c = 0; c < k.classes; ++c) {
      const Vec log = load(&side.logs[c][i]) - largest, soft = exp_nonpos(log);
      if (!mixed) store(&side.logs[c][i], log);
      store(&side.soft[c][i], soft);
      sum += soft;
    }
    const Vec log_sum = log_positive(sum), inverse = 1.0f / sum;
    for (int c = 0; c < k.classes; ++c) {
      const Vec soft = load(&side.soft[c][i]) * inverse, p = k.keep * soft + k.share;
      const Vec log = mixed ? log_positive(p) : load(&side.logs[c][i]) - log_sum;
      store(&side.soft[c][i], soft);
      store(&side.logs[c][i], log);
      entropy -= p * log;
    }
    store(side.entropy + i, entropy);
  }
}

FWM_INLINE void add_lanes(const Lanes& p, const Lanes& q, const Mixture& k, float* kl) {
  for (int i = 0; i < kLanes; i += kVec) {
    Vec sum{};
    for (int c = 0; c < k.classes; ++c) {
      const Vec gap = load(&p.logs[c][i]) - load(&q.logs[c][i]);
      sum += (k.keep * load(&p.soft[c][i]) + k.share) * gap;
    }
    store(kl + i, sum);
  }
}

// `add_lanes`, and the logits' slopes take the place of the softmax: d KL / d post in p, d KL / d
// prior in q.
template <bool mixed>
FWM_INLINE void slopes(Lanes& p, Lanes& q, const Mixture& k, float* kl) {
  for (int i = 0; i < kLanes; i += kVec) {
    Vec sum{}, post_dot{}, prior_dot{};
    for (int c = 0; c < k.classes; ++c) {
      const Vec gap = load(&p.logs[c][i]) - load(&q.logs[c][i]), soft = load(&p.soft[c][i]);
      const Vec kept = k.keep * load(&q.soft[c][i]), prob = k.keep * soft + k.share;
      const Vec pull = mixed ? kept / (kept + k.share) * prob : prob;
      store(&p.logs[c][i], gap);
      store(&q.logs[c][i], pull);
      sum += prob * gap;
      post_dot += soft * gap;
      prior_dot += pull;
    }
    for (int c = 0; c < k.classes; ++c) {
      const Vec gap = load(&p.logs[c][i]), pull = load(&q.logs[c][i]);
      store(&p.soft[c][i], k.keep * load(&p.soft[c][i]) * (gap - post_dot));
      store(&q.soft[c][i], load(&q.soft[c][i]) * prior_dot - pull);
    }
    store(kl + i, sum);
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

// Asks for what the next tile reads and writes. Rows are turned in pieces of 32 bytes, far apart:
// no pattern that a CPU would follow by itself.
FWM_HD void ask_for(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + i, 0);
}

FWM_HD void ask_to_write(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + i, 1);
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
    const int64_t next = group + kLanes, ahead = last - next < kLanes ? last - next : kLanes;
    if (ahead > 0) {
      ask_for(a.post + next * a.classes, ahead * a.classes);
      ask_for(a.prior + next * a.classes, ahead * a.classes);
    }
    fill_lanes<mixed>(post, k, p);
    fill_lanes<mixed>(prior, k, q);
    if (out.slope_post == nullptr) add_lanes(p, q, k, values[0]);
    memcpy(values[1], p.entropy, sizeof(p.entropy));
    memcpy(values[2], q.entropy, sizeof(q.entropy));
    if (out.slope_post != nullptr) {
      ask_to_write(out.slope_post + start, count * a.classes);
      ask_to_write(out.slope_prior + start, count * a.classes);
      slopes<mixed>(p, q, k, values[0]);
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
