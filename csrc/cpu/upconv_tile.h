// Products whose sums stay in registers, for upconv.cpp. Included once per instruction set inside
// its namespace, after vec.h, with what says where lanes lie. Results lie in SIMD lanes, in panels
// of two vectors and perhaps a last one of a single vector.

constexpr int64_t kPanel = 2 * kVec;
constexpr int kRows = kVec == 4 ? 4 : kVec == 8 ? 6 : 12;  // of results with two vectors each

FWM_INLINE int64_t vectors(int64_t width) { return (width + kVec - 1) / kVec; }

// Whether both column parities share their second frequency.
FWM_INLINE bool shares_columns(const UpconvSizes& n) { return n.outputs % kVec == 0; }

// Products of a frequency and tile: (a, b, C'), or without the dimensions that it shares.
FWM_INLINE int64_t lanes_of(const UpconvSizes& n, int64_t frequency) {
  const int64_t parities = frequency % 4 == 1 && shares_columns(n) ? 1 : 2;
  return (frequency / 4 == 1 ? 1 : 2) * parities * n.outputs;
}

// Which phase 2 a + b the block `index` of C' lanes belongs to; with others, where it is shared.
FWM_INLINE int64_t phase_of(const UpconvSizes& n, int64_t frequency, int64_t index) {
  return frequency % 4 == 1 && shares_columns(n) ? 2 * index : index;
}

// A number for each kind of frequency: the second one along neither dimension, the columns, the
// rows, both.
struct Places {
  int64_t plain, column, row, both;
};

// Where the lane of row parity a and place `column` in (b, C') lies.
FWM_INLINE Places places_of(const UpconvSizes& n, int64_t parity, int64_t column) {
  const bool shared = shares_columns(n);
  const int64_t second = shared ? column % n.outputs : column;
  return {parity * n.run() + column, parity * (shared ? n.outputs : n.run()) + second, column,
          second};
}

// Number (r, k) lies at data[r * row + k * step].
struct Factor {
  const float* data;
  int64_t row, step;
};

// kCount rows of kVectors: y = init + x panel, or y += x panel.
template <int kCount, int kVectors, bool kAdd>
void tile(const Factor& x, int64_t depth, const float* panel, int64_t panel_row, const float* init,
          float* y, int64_t y_row) {
  Vec sum[kCount][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = init ? load(init + v * kVec) : Vec{};
  }
  const float* from = x.data;
  for (int64_t k = 0; k < depth; ++k, from += x.step, panel += panel_row) {
    Vec w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kVec);
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      const float s = from[r * x.row];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += s * w[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + r * y_row + v * kVec;
      store(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// All rows, in pieces of nearly equal size: a short one would wait for its own sums.
template <int kVectors, bool kAdd>
void tiles(Factor x, int64_t depth, const float* panel, int64_t panel_row, const float* init,
           float* y, int64_t y_row, int64_t rows) {
  constexpr int64_t kMost = kVectors == 2 ? kRows : kRows > 6 ? 12 : 2 * kRows;
  for (int64_t pieces = (rows + kMost - 1) / kMost; pieces > 0; --pieces) {
    const int64_t count = (rows + pieces - 1) / pieces;
    switch (count) {
#define FWM_ROW_COUNT(n)                                                   \
  case n:                                                                  \
    if constexpr (n <= kMost) {                                            \
      tile<n, kVectors, kAdd>(x, depth, panel, panel_row, init, y, y_row); \
    }                                                                      \
    break;
      FWM_ROW_COUNT(1)
      FWM_ROW_COUNT(2)
      FWM_ROW_COUNT(3)
      FWM_ROW_COUNT(4)
      FWM_ROW_COUNT(5)
      FWM_ROW_COUNT(6)
      FWM_ROW_COUNT(7)
      FWM_ROW_COUNT(8)
      FWM_ROW_COUNT(9)
      FWM_ROW_COUNT(10)
      FWM_ROW_COUNT(11)
      FWM_ROW_COUNT(12)
#undef FWM_ROW_COUNT
    }
    x.data += count * x.row;
    y += count * y_row;
    rows -= count;
  }
}

// y (rows, width) = init + x (rows, depth) times a matrix in panels.
FWM_INLINE void multiply(const Factor& x, int64_t depth, const float* packed, int64_t width,
                         const float* init, float* y, int64_t y_row, int64_t rows) {
  const int64_t end = vectors(width) * kVec;
  for (int64_t column = 0; column < end; column += kPanel) {
    const float *panel = packed + column * depth, *start = init ? init + column : nullptr;
    if (end - column >= kPanel) {
      tiles<2, false>(x, depth, panel, kPanel, start, y + column, y_row, rows);
    } else {
      tiles<1, false>(x, depth, panel, kVec, start, y + column, y_row, rows);
    }
  }
}

// sums (rows, …) += x (rows, depth) times matrix (depth, width), rows of both in whole vectors.
FWM_INLINE void add_product(const Factor& x, int64_t depth, const float* matrix, int64_t width,
                            float* sums, int64_t sums_row, int64_t rows) {
  const int64_t end = vectors(width) * kVec;
  for (int64_t column = 0; column < end; column += kPanel) {
    if (end - column >= kPanel) {
      tiles<2, true>(x, depth, matrix + column, width, nullptr, sums + column, sums_row, rows);
    } else {
      tiles<1, true>(x, depth, matrix + column, width, nullptr, sums + column, sums_row, rows);
    }
  }
}
