// FWM_R rows times one panel, all sums in registers. Included by rssm_body.h once per row count.
// With FWM_TURNED the rows are columns: x (depth, rows), names turned1 … in place of tile1 ….
#undef FWM_TILE
#undef FWM_SUM
#undef FWM_FIRST
#undef FWM_AT
#ifdef FWM_TURNED
#define FWM_TILE FWM_JOIN(turned, FWM_R)
#define FWM_SUM FWM_JOIN(sum_turned, FWM_R)
#define FWM_FIRST row
#define FWM_AT(r, k) ((k) * part.row + (r))
#else
#define FWM_TILE FWM_JOIN(tile, FWM_R)
#define FWM_SUM FWM_JOIN(accumulate, FWM_R)
#define FWM_FIRST row* part.row
#define FWM_AT(r, k) ((r) * part.row + (k))
#endif

FWM_INLINE void FWM_SUM(Vec (&sum)[FWM_R][2], const Part& part, int64_t row, const float* panel) {
  const float* x = part.x + FWM_FIRST;
  for (int64_t k = 0; k < part.depth; ++k, panel += kPanel) {
    __builtin_prefetch(panel + kAhead);
    __builtin_prefetch(panel + kAhead + kVec);
    const Vec w0 = *(const Vec*)panel, w1 = *(const Vec*)(panel + kVec);
#pragma GCC unroll 8
    for (int r = 0; r < FWM_R; ++r) {
      const float s = x[FWM_AT(r, k)];
      sum[r][0] += s * w0;
      sum[r][1] += s * w1;
    }
  }
}

FWM_INLINE void FWM_TILE(const float* panel, const Part& part, const Target& to, int64_t row) {
  Vec sum[FWM_R][2];
  float edge[kPanel];
#pragma GCC unroll 8
  for (int r = 0; r < FWM_R; ++r) {
    sum[r][0] = sum[r][1] = Vec{};
    if (to.init == nullptr) continue;
    const float* init = to.init + (row + r) * to.init_row;
    if (to.width < kPanel) {
      for (int64_t n = 0; n < kPanel; ++n) edge[n] = n < to.width ? init[n] : 0.0f;
      init = edge;
    }
    sum[r][0] = *(const Vec*)init;
    sum[r][1] = *(const Vec*)(init + kVec);
  }
  FWM_SUM(sum, part, row, panel);
#pragma GCC unroll 8
  for (int r = 0; r < FWM_R; ++r) {
    float* y = to.y + (row + r) * to.row;
    if (to.width < kPanel) {
      *(Vec*)edge = sum[r][0];
      *(Vec*)(edge + kVec) = sum[r][1];
      for (int64_t n = 0; n < to.width; ++n) y[n] = edge[n];
    } else {
      *(Vec*)y = sum[r][0];
      *(Vec*)(y + kVec) = sum[r][1];
    }
  }
}

#undef FWM_R
