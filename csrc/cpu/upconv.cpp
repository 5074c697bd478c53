// The decoder's upsampling convolution by Winograd's F(2x2, 3x3); see upconv.h. A few rows of tiles
// at a time go through all steps while they are in cache: the small image is transformed,
// each frequency is one product of (tiles, C) and (C, lanes), and the products are transformed back
// into the rows of the large image. Channels and phases lie in SIMD lanes all the way.
//
// Rows of scratch lie one after the other and are written in order by whole vectors: what a vector
// spills behind its row is overwritten by the next one, and behind the last row there is room.
#ifndef FWM_ISA
#include "cpu/upconv.h"

#include "cpu/simd.h"

namespace fastwm {

// The kernel along one dimension: [parity][frequency][tap]. Taps fall together on three pixels, in
// a way that depends on the parity, and these go through G of F(2, 3).
static constexpr float kTaps[2][4][5] = {
    {{1, 1, 0, 0, 0}, {.5, .5, .5, .5, .5}, {.5, .5, -.5, -.5, .5}, {0, 0, 0, 0, 1}},
    {{1, 0, 0, 0, 0}, {.5, .5, .5, .5, .5}, {.5, -.5, -.5, .5, .5}, {0, 0, 0, 1, 1}}};

// Rows of whole vectors of any width, and lists that do not begin in the same set of the cache.
static constexpr int64_t kSlack = 16;
static inline int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }
static inline int64_t apart(int64_t n) { return whole(n) + kSlack; }

int64_t UpconvSizes::packed() const {
  return kFrequencies * inputs * whole(4 * outputs) + whole(4 * outputs);
}
int64_t UpconvSizes::turned() const { return kFrequencies * 4 * outputs * whole(inputs); }
int64_t UpconvSizes::sums() const { return kFrequencies * inputs * whole(4 * outputs) + whole(4 * outputs); }

}  // namespace fastwm

#define FWM_SOURCE "cpu/upconv.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

// Four lines of an image, zeros beside them, then per frequency and tile its inputs, its lanes, and
// in the backward pass the gradients of its inputs.
int64_t UpconvSizes::scratch() const {
  const int64_t line = apart((2 * across() + 2) * inputs), count = tiles();
  const int64_t values = apart(count * inputs), products = apart(count * whole(4 * outputs));
  return 11 * line + kFrequencies * (values + products + apart(count * whole(inputs)));
}

void upconv_pack(const UpconvSizes& n, const float* weight, const float* bias, float* packed) {
  FWM_CALL(upconv_pack)(n, weight, bias, packed);
}

void upconv(const Upconv& a, float* scratch, float* y, int64_t begin, int64_t end) {
  FWM_CALL(upconv)(a, scratch, y, begin, end);
}

void upconv_turn(const UpconvSizes& n, const float* weight, float* turned) {
  FWM_CALL(upconv_turn)(n, weight, turned);
}

void upconv_backward(const UpconvGrad& a, float* scratch, float* grad_x, float* sums, int64_t begin,
                     int64_t end) {
  FWM_CALL(upconv_backward)(a, scratch, grad_x, sums, begin, end);
}

void upconv_fold(const UpconvSizes& n, const float* sums, float* grad_weight, float* grad_bias) {
  FWM_CALL(upconv_fold)(n, sums, grad_weight, grad_bias);
}

}  // namespace fastwm

#else

#include "cpu/vec.h"

namespace fastwm::FWM_ISA {
namespace {

#include "cpu/upconv_tile.h"

// The kernel at a frequency: [a][b] of one pair of channels.
void transform_kernel(const float* taps, float (&out)[kFrequencies][4]) {
  float half[2][4][5];
  for (int a = 0; a < 2; ++a) {
    for (int f = 0; f < 4; ++f) {
      for (int v = 0; v < 5; ++v) {
        float sum = 0.0f;
        for (int u = 0; u < 5; ++u) sum += kTaps[a][f][u] * taps[5 * u + v];
        half[a][f][v] = sum;
      }
    }
  }
  for (int f = 0; f < kFrequencies; ++f) {
    for (int phase = 0; phase < 4; ++phase) {
      float sum = 0.0f;
      for (int v = 0; v < 5; ++v) sum += kTaps[phase & 1][f & 3][v] * half[phase >> 1][f >> 2][v];
      out[f][phase] = sum;
    }
  }
}

// Its transposed map: gradients at the frequencies become gradients of the taps.
void transform_kernel_back(const float (&grads)[kFrequencies][4], float* taps) {
  for (int i = 0; i < 25; ++i) taps[i] = 0.0f;
  for (int f = 0; f < kFrequencies; ++f) {
    const int phases = f / 4 == 1 ? 2 : 4;
    for (int phase = 0; phase < phases; ++phase) {
      for (int u = 0; u < 5; ++u) {
        const float along = kTaps[phase >> 1][f >> 2][u] * grads[f][phase];
        for (int v = 0; v < 5; ++v) taps[5 * u + v] += along * kTaps[phase & 1][f & 3][v];
      }
    }
  }
}

// Where number (k, column) of a matrix of `width` columns lies, panels of kPanel columns each.
FWM_INLINE int64_t in_panels(int64_t depth, int64_t width, int64_t k, int64_t column) {
  const int64_t first = column / kPanel * kPanel;
  const int64_t left = vectors(width) * kVec - first;
  return first * depth + k * (left < kPanel ? left : kPanel) + column - first;
}

// Memory of one call.
struct Room {
  float* next;
  FWM_INLINE float* take(int64_t count) {
    float* piece = next;
    next += count;
    return piece;
  }
};

// Numbers per frequency and tile.
struct Plane {
  float* data;
  int64_t row, stride;  // of a tile, of a frequency
  FWM_INLINE Plane(Room& room, int64_t tiles, int64_t row_)
      : row(row_), stride(apart(tiles * row_)) {
    data = room.take(kFrequencies * stride);
  }
  FWM_INLINE float* at(int64_t frequency) const { return data + frequency * stride; }
};

// Four lines with a column of zeros before and up to two behind them, and a line of zeros.
struct Lines {
  float *lines, *zeros;
  int64_t stride, inner;  // of a line, of an image's row
  FWM_INLINE Lines(Room& room, const UpconvSizes& n)
      : stride(apart((2 * n.across() + 2) * n.inputs)), inner(n.width * n.inputs) {
    lines = room.take(4 * stride);
    zeros = room.take(stride);
    for (int64_t i = 0; i < 5 * stride; ++i) lines[i] = 0.0f;
  }
  FWM_INLINE float* line(int64_t i) const { return lines + i * stride; }
};

// Of a row of tiles, x is its image: the frequencies along the rows into lines.
void transform_rows(const UpconvSizes& n, const Lines& to, const float* x, int64_t row) {
  const float* from[4];
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t r = 2 * row - 1 + i;
    from[i] = r < 0 || r >= n.height ? to.zeros : x + r * to.inner;
  }
  float *l0 = to.line(0) + n.inputs, *l1 = to.line(1) + n.inputs;
  float *l2 = to.line(2) + n.inputs, *l3 = to.line(3) + n.inputs;
#pragma omp simd
  for (int64_t i = 0; i < to.inner; ++i) {
    const float a = from[0][i], b = from[1][i], c = from[2][i], d = from[3][i];
    l0[i] = a - c;
    l1[i] = b + c;
    l2[i] = c - b;
    l3[i] = b - d;
  }
}

// And along the columns, into values of tiles [tile, tile + across).
void transform_columns(const UpconvSizes& n, const Lines& from, const Plane& values, int64_t tile) {
  const int64_t inputs = n.inputs, across = n.across();
  for (int64_t j = 0; j < across; ++j) {
    float* to = values.data + (tile + j) * inputs;
    const float* line = from.lines + 2 * j * inputs;
    for (int64_t c = 0; c < inputs; c += kVec) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const float* at = line + i * from.stride + c;
        const Vec e0 = load(at), e1 = load(at + inputs);
        const Vec e2 = load(at + 2 * inputs), e3 = load(at + 3 * inputs);
        float* out = to + 4 * i * values.stride + c;
        store(out, e0 - e2);
        store(out + values.stride, e1 + e2);
        store(out + 2 * values.stride, e2 - e1);
        store(out + 3 * values.stride, e1 - e3);
      }
    }
  }
}

void transform_image(const UpconvSizes& n, const Lines& lines, const Plane& values, const float* x,
                     int64_t first, int64_t rows) {
  for (int64_t q = 0; q < rows; ++q) {
    const int64_t image = (first + q) / n.down(), row = (first + q) % n.down();
    transform_rows(n, lines, x + image * n.height * lines.inner, row);
    transform_columns(n, lines, values, q * n.across());
  }
}

// Which of the tile's lanes a vector holds: of parity a from column r on.
struct Lanes {
  int64_t parity, column;
  FWM_INLINE int64_t at(const UpconvSizes& n, int64_t frequency) const {
    return (frequency / 4 == 1 ? 0 : parity * n.run()) + column;
  }
};

// y[2 p + q]: results of the tile's pixel (p, q).
FWM_INLINE void transform_products(const UpconvSizes& n, const Plane& products, int64_t tile,
                                   const Lanes& lanes, Vec (&y)[4]) {
  const float* from = products.data + tile * products.row;
  Vec upper[4], lower[4];
#pragma GCC unroll 4
  for (int64_t f = 0; f < 4; ++f) {
    const Vec m0 = load(from + f * products.stride + lanes.at(n, 0));
    const Vec m1 = load(from + (4 + f) * products.stride + lanes.at(n, 4));
    const Vec m2 = load(from + (8 + f) * products.stride + lanes.at(n, 0));
    const Vec m3 = load(from + (12 + f) * products.stride + lanes.at(n, 0));
    upper[f] = m0 + m1 + m2;
    lower[f] = m1 - m2 - m3;
  }
  y[0] = upper[0] + upper[1] + upper[2];
  y[1] = upper[1] - upper[2] - upper[3];
  y[2] = lower[0] + lower[1] + lower[2];
  y[3] = lower[1] - lower[2] - lower[3];
}

// A row of tiles of the large image y.
void write_row(const UpconvSizes& n, const Plane& products, int64_t tile, int64_t row, float* y) {
  const int64_t run = n.run(), line = n.width * run;
  for (int64_t j = 0; j < n.across(); ++j) {
    for (int64_t parity = 0; parity < 2; ++parity) {
      float* corner = y + (4 * row + parity) * line + 2 * j * run;
      for (int64_t r = 0; r < run; r += kVec) {
        const int64_t column = run < kVec ? 0 : r + kVec < run ? r : run - kVec;
        Vec results[4];
        transform_products(n, products, tile + j, Lanes{parity, column}, results);
#pragma GCC unroll 4
        for (int64_t pixel = 0; pixel < 4; ++pixel) {
          const int64_t p = pixel >> 1, q = pixel & 1;
          if (2 * row + p >= n.height || 2 * j + q >= n.width) continue;
          float* to = corner + 2 * p * line + q * run + column;
          if (run >= kVec || (n.width - 2 * j - q) * run >= kVec) {
            store(to, results[pixel]);  // the spill is overwritten by the next pixels
          } else {
            const float* from = reinterpret_cast<const float*>(&results[pixel]);
            for (int64_t i = 0; i < run; ++i) to[i] = from[i];
          }
        }
      }
    }
  }
}

// The gradient of one pixel's lanes, zero outside of the image.
FWM_INLINE Vec gradient(const UpconvSizes& n, const float* grad_y, int64_t row, int64_t column,
                        const Lanes& lanes) {
  if (row >= n.height || column >= n.width) return Vec{};
  const float* from = grad_y + (2 * row + lanes.parity) * n.width * n.run() + column * n.run();
  if (n.run() >= kVec || (n.width - column) * n.run() >= kVec) return load(from + lanes.column);
  Vec edge = {};
  for (int64_t i = 0; i < n.run(); ++i) edge[i] = from[i];
  return edge;
}

// A row of tiles of the gradient, transformed as the transposed map of the results wants it.
void read_row(const UpconvSizes& n, const float* grad_y, int64_t row, const Plane& products,
              int64_t tile) {
  const int64_t run = n.run();
  for (int64_t j = 0; j < n.across(); ++j) {
    for (int64_t r = 0; r < run; r += kVec) {
      const int64_t column = run < kVec ? 0 : r + kVec < run ? r : run - kVec;
      Vec shared[4] = {};  // the frequency that both parities have in common
      for (int64_t parity = 0; parity < 2; ++parity) {
        const Lanes lanes{parity, column};
        Vec g[4];
#pragma GCC unroll 4
        for (int64_t pixel = 0; pixel < 4; ++pixel) {
          g[pixel] = gradient(n, grad_y, 2 * row + (pixel >> 1), 2 * j + (pixel & 1), lanes);
        }
        const Vec rows[4][2] = {
            {g[0], g[1]}, {g[0] + g[2], g[1] + g[3]}, {g[0] - g[2], g[1] - g[3]}, {-g[2], -g[3]}};
#pragma GCC unroll 4
        for (int64_t f = 0; f < 4; ++f) {
          const Vec e0 = rows[f][0], e1 = rows[f][1];
          const Vec all[4] = {e0, e0 + e1, e0 - e1, -e1};
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) {
            float* to = products.at(4 * f + i) + (tile + j) * n.lanes(4 * f) + lanes.at(n, 4 * f);
            if (f == 1) {
              shared[i] += all[i];
              if (parity == 1) store(to, shared[i]);
            } else {
              store(to, all[i]);
            }
          }
        }
      }
    }
  }
}

// The transposed map of transform_columns: values' gradients (…, stride row) into four lines.
void gather_columns(const UpconvSizes& n, const Lines& to, const Plane& values, int64_t tile) {
  const int64_t inputs = n.inputs, across = n.across();
  for (int64_t i = 0; i < 4; ++i) {
    const float *v0 = values.at(4 * i), *v1 = values.at(4 * i + 1);
    const float *v2 = values.at(4 * i + 2), *v3 = values.at(4 * i + 3);
    float* line = to.line(i);
    for (int64_t j = 0; j < across; ++j) {
      const int64_t at = (tile + j) * values.row;
      const float* before = j > 0 ? v3 + at - values.row : to.zeros;
      const float* behind = j + 1 < across ? v0 + at + values.row : to.zeros;
      for (int64_t c = 0; c < inputs; c += kVec, line += kVec) {
        store(line, load(v1 + at + c) - load(v2 + at + c) + load(v3 + at + c) - load(before + c));
      }
      line -= (inputs + kVec - 1) / kVec * kVec - inputs;
      for (int64_t c = 0; c < inputs; c += kVec, line += kVec) {
        store(line, load(v1 + at + c) + load(v2 + at + c) - load(v0 + at + c) + load(behind + c));
      }
      line -= (inputs + kVec - 1) / kVec * kVec - inputs;
    }
  }
}

// And of transform_rows: lines into the rows of grad_x, an image. `carry` goes from a row of tiles
// to the next one.
void gather_rows(const UpconvSizes& n, const Lines& from, int64_t row, float* carry, float* grad_x) {
  const float *l0 = from.line(0), *l1 = from.line(1), *l2 = from.line(2), *l3 = from.line(3);
  float* upper = grad_x + 2 * row * from.inner;
  float* lower = upper + from.inner;
  if (row == 0) {
    for (int64_t i = 0; i < from.inner; ++i) carry[i] = 0.0f;
  } else {
    float* above = upper - from.inner;
#pragma omp simd
    for (int64_t i = 0; i < from.inner; ++i) above[i] += l0[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < from.inner; ++i) {
    upper[i] = l1[i] - l2[i] + l3[i] - carry[i];
    carry[i] = l3[i];
  }
  if (2 * row + 1 >= n.height) return;
#pragma omp simd
  for (int64_t i = 0; i < from.inner; ++i) lower[i] = l1[i] + l2[i] - l0[i];
}

}  // namespace

void upconv_pack(const UpconvSizes& n, const float* weight, const float* bias, float* packed) {
  const int64_t step = n.inputs * whole(4 * n.outputs);
  for (int64_t i = 0; i < n.packed(); ++i) packed[i] = 0.0f;
  for (int64_t o = 0; o < n.outputs; ++o) {
    for (int64_t c = 0; c < n.inputs; ++c) {
      float kernel[kFrequencies][4];
      transform_kernel(weight + (o * n.inputs + c) * 25, kernel);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t phase = 0; phase * n.outputs < n.lanes(f); ++phase) {
          const int64_t to = in_panels(n.inputs, n.lanes(f), c, phase * n.outputs + o);
          packed[f * step + to] = kernel[f][phase];
        }
      }
    }
  }
  float* lanes = packed + kFrequencies * step;
  for (int64_t i = 0; i < n.run() && bias; ++i) lanes[i] = bias[i % n.outputs];
}

void upconv(const Upconv& a, float* scratch, float* y, int64_t begin, int64_t end) {
  const UpconvSizes& n = a.n;
  Room room{scratch};
  const Lines lines(room, n);
  const Plane values(room, n.tiles(), n.inputs);
  const Plane products(room, n.tiles(), whole(4 * n.outputs));
  const int64_t step = n.inputs * whole(4 * n.outputs), image = 4 * n.height * n.width * n.outputs;
  const int64_t last = end * n.down();
  for (int64_t first = begin * n.down(); first < last; first += n.rows()) {
    const int64_t rows = last - first < n.rows() ? last - first : n.rows();
    transform_image(n, lines, values, a.x, first, rows);
    for (int64_t f = 0; f < kFrequencies; ++f) {
      const Factor x{values.at(f), n.inputs, 1};
      // A bias of the products at (1, 1) is one of every result.
      const float* init = f == 5 ? a.packed + kFrequencies * step : nullptr;
      multiply(x, n.inputs, a.packed + f * step, n.lanes(f), init, products.at(f), products.row,
               rows * n.across());
    }
    for (int64_t q = 0; q < rows; ++q) {
      float* to = y + (first + q) / n.down() * image;
      write_row(n, products, q * n.across(), (first + q) % n.down(), to);
    }
  }
}

void upconv_turn(const UpconvSizes& n, const float* weight, float* turned) {
  const int64_t step = 4 * n.outputs * whole(n.inputs);
  for (int64_t i = 0; i < n.turned(); ++i) turned[i] = 0.0f;
  for (int64_t o = 0; o < n.outputs; ++o) {
    for (int64_t c = 0; c < n.inputs; ++c) {
      float kernel[kFrequencies][4];
      transform_kernel(weight + (o * n.inputs + c) * 25, kernel);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t phase = 0; phase * n.outputs < n.lanes(f); ++phase) {
          const int64_t to = in_panels(n.lanes(f), n.inputs, phase * n.outputs + o, c);
          turned[f * step + to] = kernel[f][phase];
        }
      }
    }
  }
}

void upconv_backward(const UpconvGrad& a, float* scratch, float* grad_x, float* sums, int64_t begin,
                     int64_t end) {
  const UpconvSizes& n = a.n;
  Room room{scratch};
  const Lines lines(room, n), gathered(room, n);
  float* carry = room.take(lines.stride);
  const Plane values(room, n.tiles(), n.inputs);
  const Plane products(room, n.tiles(), 4 * n.outputs);
  const Plane grads(room, n.tiles(), vectors(n.inputs) * kVec);
  const int64_t step = n.inputs * whole(4 * n.outputs), turn = 4 * n.outputs * whole(n.inputs);
  const int64_t line = n.width * n.run(), last = end * n.down();
  for (int64_t i = 0; i < n.sums() && a.want_weight; ++i) sums[i] = 0.0f;
  for (int64_t first = begin * n.down(); first < last; first += n.rows()) {
    const int64_t rows = last - first < n.rows() ? last - first : n.rows();
    const int64_t tiles = rows * n.across();
    for (int64_t q = 0; q < rows; ++q) {
      const float* from = a.grad_y + (first + q) / n.down() * 2 * n.height * line;
      read_row(n, from, (first + q) % n.down(), products, q * n.across());
    }
    if (a.want_weight) {
      transform_image(n, lines, values, a.x, first, rows);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        const Factor x{values.at(f), 1, n.inputs};
        add_product(x, tiles, products.at(f), n.lanes(f), sums + f * step, whole(4 * n.outputs),
                    n.inputs);
      }
      float* bias = sums + kFrequencies * step;
      const float* all = products.at(5);
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t i = 0; i < n.run(); ++i) bias[i] += all[t * n.run() + i];
      }
    }
    if (!a.turned) continue;
    for (int64_t f = 0; f < kFrequencies; ++f) {
      const Factor g{products.at(f), n.lanes(f), 1};
      multiply(g, n.lanes(f), a.turned + f * turn, n.inputs, nullptr, grads.at(f), grads.row, tiles);
    }
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t image = (first + q) / n.down(), row = (first + q) % n.down();
      gather_columns(n, gathered, grads, q * n.across());
      gather_rows(n, gathered, row, carry, grad_x + image * n.height * lines.inner);
    }
  }
}

void upconv_fold(const UpconvSizes& n, const float* sums, float* grad_weight, float* grad_bias) {
  const int64_t width = whole(4 * n.outputs), step = n.inputs * width;
  for (int64_t o = 0; o < n.outputs; ++o) {
    for (int64_t c = 0; c < n.inputs; ++c) {
      float grads[kFrequencies][4];
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t phase = 0; phase * n.outputs < n.lanes(f); ++phase) {
          grads[f][phase] = sums[f * step + c * width + phase * n.outputs + o];
        }
      }
      transform_kernel_back(grads, grad_weight + (o * n.inputs + c) * 25);
    }
    const float* bias = sums + kFrequencies * step;
    grad_bias[o] = bias[o] + bias[n.outputs + o];
  }
}

}  // namespace fastwm::FWM_ISA

#endif
