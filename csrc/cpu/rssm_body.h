// Building blocks of the RSSM kernels, compiled once per instruction set (see simd.h): packed
// weights, products of a few rows with them, norms. No include guard, and no #include but
// of its like: it sits inside a target region.
//
// Rows stay row-major and outputs lie in SIMD lanes: a panel of kPanel output columns is packed as
// [depth][kPanel], kRows rows at a time keep their sums in registers. A product of B = 16 rows
// therefore reads every weight once or twice from L2, and any batch size runs without padding.
// The sum over depth has one order whatever the batch and the threads.

#include "cpu/vec.h"
#include "cpu/wide.h"

#undef FWM_ROWS
#if FWM_VECTOR_BYTES == 64
#define FWM_ROWS 8
#elif FWM_VECTOR_BYTES == 32
#define FWM_ROWS 6
#else
#define FWM_ROWS 4
#endif

namespace fastwm::FWM_ISA {
namespace {

constexpr int64_t kPanel = 2 * kVec;
constexpr int kRows = FWM_ROWS;
constexpr int64_t kChunk = 64;               // rows that share one pass over a panel
constexpr int64_t kSlice = 192;              // depth of a panel that one pass covers: 24 KB at most
constexpr int64_t kAhead = kSlice * kPanel;  // weights are asked for one slice ahead
constexpr float kEps = 1e-4f;

FWM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row stride that does not put all rows of a column into the same set of the L1 cache.
FWM_INLINE int64_t padded(int64_t width) { return ceil_div(width, 16) * 16 + 16; }

// Every worker takes the same pieces of the same workspace.
struct Arena {
  float* next;
  FWM_INLINE float* take(int64_t count) {
    float* piece = next;
    next += ceil_div(count, 16) * 16;
    return piece;
  }
};

// `blocks` matrices of (depth, out), each as panels of kPanel columns, the last one zero-padded.
struct Packed {
  int64_t blocks = 0, out = 0, depth = 0, panels = 0;
  float* data = nullptr;

  FWM_INLINE void place(Arena& arena, int64_t blocks_, int64_t out_, int64_t depth_) {
    blocks = blocks_, out = out_, depth = depth_, panels = ceil_div(out, kPanel);
    data = arena.take(count() * kPanel * depth);
  }
  FWM_INLINE int64_t count() const { return blocks * panels; }
  FWM_INLINE float* panel(int64_t item) const { return data + item * kPanel * depth; }
  FWM_INLINE int64_t block(int64_t item) const { return item / panels; }
  FWM_INLINE int64_t column(int64_t item) const { return item % panels * kPanel; }
  FWM_INLINE int64_t width(int64_t item) const {
    const int64_t left = out - column(item);
    return left < kPanel ? left : kPanel;
  }
};

// Rows [first, first + depth) of a panel from source[n * step_out + k * step_in], n < width.
FWM_INLINE void pack(float* panel, int64_t first, int64_t depth, int64_t width, const float* source,
                     int64_t step_out, int64_t step_in) {
  panel += first * kPanel;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t n = 0; n < width; ++n) panel[k * kPanel + n] = source[n * step_out + k * step_in];
    for (int64_t n = width; n < kPanel; ++n) panel[k * kPanel + n] = 0.0f;
  }
}

// A group of input columns: row r starts at x + r * row.
struct Part {
  const float* x;
  int64_t row, depth;
};

struct Target {
  const float* init;  // null: zero
  int64_t init_row;   // 0: one vector for all rows
  float* y;
  int64_t row, width;
};

// tile1 … tile8: macros, because GCC compiles templates outside of the target region.
#define FWM_R 1
#include "cpu/rssm_tile.h"
#define FWM_R 2
#include "cpu/rssm_tile.h"
#define FWM_R 3
#include "cpu/rssm_tile.h"
#define FWM_R 4
#include "cpu/rssm_tile.h"
#if FWM_ROWS > 4
#define FWM_R 5
#include "cpu/rssm_tile.h"
#define FWM_R 6
#include "cpu/rssm_tile.h"
#endif
#if FWM_ROWS > 6
#define FWM_R 7
#include "cpu/rssm_tile.h"
#define FWM_R 8
#include "cpu/rssm_tile.h"
#endif

FWM_INLINE void product_rows(const float* panel, const Part& part, const Target& to, int64_t begin,
                             int64_t end) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) FWM_JOIN(tile, FWM_ROWS)(panel, part, to, row);
  switch (end - row) {
    case 1:
      tile1(panel, part, to, row);
      break;
    case 2:
      tile2(panel, part, to, row);
      break;
    case 3:
      tile3(panel, part, to, row);
      break;
#if FWM_ROWS > 4
    case 4:
      tile4(panel, part, to, row);
      break;
    case 5:
      tile5(panel, part, to, row);
      break;
#endif
#if FWM_ROWS > 6
    case 6:
      tile6(panel, part, to, row);
      break;
    case 7:
      tile7(panel, part, to, row);
      break;
#endif
    default:
      break;
  }
}

// y = init + [a, b] times one panel, for rows [begin, end). Depth goes in slices that stay in L1
// while all rows pass.
FWM_INLINE void product(const float* panel, const Part& a, const Part& b, Target to, int64_t begin,
                        int64_t end) {
  for (const Part& part : {a, b}) {
    for (int64_t k = 0; k < part.depth; k += kSlice) {
      const int64_t depth = part.depth - k < kSlice ? part.depth - k : kSlice;
      product_rows(panel, Part{part.x + k, part.row, depth}, to, begin, end);
      panel += depth * kPanel;
      to.init = to.y, to.init_row = to.row;
    }
  }
}

constexpr Part kNone{nullptr, 0, 0};

// Items of a phase: panels, each over chunks of rows.
struct Items {
  int64_t batch, chunks;
  FWM_INLINE explicit Items(int64_t batch_) : batch(batch_), chunks(ceil_div(batch_, kChunk)) {}
  FWM_INLINE int64_t count(const Packed& w) const { return w.count() * chunks; }
  FWM_INLINE int64_t panel(int64_t item) const { return item / chunks; }
  FWM_INLINE int64_t begin(int64_t item) const { return item % chunks * kChunk; }
  FWM_INLINE int64_t end(int64_t item) const {
    const int64_t stop = begin(item) + kChunk;
    return stop < batch ? stop : batch;
  }
};

// y = init + the listed rows of w (…, n), times what `factors` has there; null: as they are.
FWM_INLINE void add_rows(float* y, const float* init, const float* w, int64_t n,
                         const int32_t* list, int64_t count, const float* factors) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Wide sum = load4(init + i);
    for (int64_t k = 0; k < count; ++k) {
      const float factor = factors == nullptr ? 1.0f : factors[list[k]];
      sum = sum + factor * load4(w + list[k] * n + i);
    }
    store4(y + i, sum);
  }
  for (; i < n; ++i) {
    float sum = init[i];
    for (int64_t k = 0; k < count; ++k) {
      sum += (factors == nullptr ? 1.0f : factors[list[k]]) * w[list[k] * n + i];
    }
    y[i] = sum;
  }
}

FWM_INLINE float inverse_root(const float* x, int64_t n) {
  float squares = 0.0f;
  int64_t i = 0;
  if (n >= kWide) {
    Wide sum{};
    for (; i + kWide <= n; i += kWide) {
      const Wide row = load4(x + i);
      sum = sum + row * row;
    }
    const Vec lanes = (sum.v[0] + sum.v[1]) + (sum.v[2] + sum.v[3]);
    for (int64_t k = 0; k < kVec; ++k) squares += lanes[k];
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t k = i; k < n; ++k) squares += x[k] * x[k];
  return 1.0f / sqrtf(squares / (float)n + kEps);
}

// y = silu(x / rms(x) * scale)
FWM_INLINE void activate(const float* x, const float* scale, int64_t n, float* y) {
  const float root = inverse_root(x, n);
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store4(y + i, silu(load4(x + i) * root * load4(scale + i)));
#pragma omp simd
  for (int64_t k = i; k < n; ++k) y[k] = silu(x[k] * root * scale[k]);
}

// From the gradient g of y: dx into d, y again into y, and the gradient of scale added to total.
FWM_INLINE void activate_backward(const float* g, const float* x, const float* scale, int64_t n,
                                  float* d, float* y, float* total) {
  const float root = inverse_root(x, n);
  float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < n; ++i) {
    const float normed = x[i] * root, z = normed * scale[i];
    const float s = sigmoid(z);
    const float dz = g[i] * s * (1.0f + z * (1.0f - s));
    y[i] = z * s;
    total[i] += dz * normed;
    d[i] = dz * scale[i];
    mean += dz * scale[i] * normed;
  }
  mean /= (float)n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) d[i] = root * (d[i] - x[i] * root * mean);
}

// e = exp(logits - max of the group), (groups, classes)
FWM_INLINE void exponentials(const float* logits, int64_t groups, int64_t classes, float* e) {
  for (int64_t s = 0; s < groups; ++s) {
    const float* l = logits + s * classes;
    float top = l[0];
    for (int64_t k = 1; k < classes; ++k) top = l[k] > top ? l[k] : top;
    for (int64_t k = 0; k < classes; ++k) e[s * classes + k] = l[k] - top;
  }
#pragma omp simd
  for (int64_t i = 0; i < groups * classes; ++i) e[i] = exp_floored(e[i]);
}

FWM_INLINE int64_t largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t k = 1; k < n; ++k) best = x[k] > x[best] ? k : best;
  return best;
}

}  // namespace
}  // namespace fastwm::FWM_ISA
