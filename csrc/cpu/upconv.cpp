// The decoder's upsampling convolution by Winograd's F(2x2, 3x3); see upconv.h. A few rows of tiles
// at a time go through all steps while they are in cache: the small image is transformed,
// each frequency is one product of (tiles, C) and (C, lanes), and the products are transformed back
// into the rows of the large image, which a norm follows while they are there. Channels and phases
// lie in SIMD lanes all the way.
//
// Rows of scratch lie one after the other and are written in order by whole vectors: what a vector
// spills behind its row is overwritten by the next one, and behind the last row there is room.
#ifndef FWM_ISA
#include "cpu/upconv.h"

#include "cpu/norm_rows.h"
#include "cpu/simd.h"
#define FWM_SOURCE "cpu/upconv.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

// Four lines of an image, zeros beside them, then per frequency and tile its inputs, its lanes, and
// in the backward pass the gradients of its inputs; and a row of tiles of the large image.
int64_t UpconvSizes::scratch() const {
  const int64_t line = apart((2 * across() + 2) * inputs), count = tiles();
  const int64_t values = apart(count * inputs), products = apart(count * whole(4 * outputs));
  return 11 * line + kFrequencies * (values + products + apart(count * whole(inputs))) +
         apart(4 * this->line());
}

void upconv(const Upconv& a, float* scratch, float* y, float* z, int64_t begin, int64_t end) {
  FWM_CALL(upconv)(a, scratch, y, z, begin, end);
}

void upconv_backward(const UpconvGrad& a, float* scratch, float* grad_x, float* sums, int64_t begin,
                     int64_t end) {
  FWM_CALL(upconv_backward)(a, scratch, grad_x, sums, begin, end);
}

}  // namespace fastwm

#else

#include "cpu/vec.h"

namespace fastwm::FWM_ISA {
namespace {

#include "cpu/upconv_tile.h"

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
  const float* next = x + (2 * row + 3) * to.inner;  // what the row of tiles below reads anew
  for (int64_t i = 0; i < 2 * to.inner; i += 16) __builtin_prefetch(next + i);
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

// Where a vector of a run begins: the last one ends with it, if the run is a vector long.
FWM_INLINE int64_t column_of(int64_t run, int64_t r) {
  return run < kVec ? 0 : r + kVec < run ? r : run - kVec;
}

// How many tiles of a row can be read and written by whole vectors: all pixels lie in the image,
// and what a vector holds behind its run belongs to the pixels right of it.
FWM_INLINE int64_t whole_tiles(const UpconvSizes& n, int64_t row) {
  if (2 * row + 1 >= n.height) return 0;
  const int64_t beside = (kVec - 1) / n.run();  // pixels that a vector touches behind its own
  const int64_t tiles = (n.width - beside) / 2;
  return tiles < 0 ? 0 : tiles;
}

// Products of one vector of lanes, at these places of each frequency, become the results of 2x2
// pixels.
FWM_INLINE void transform_products(const float* from, const Places& lanes, int64_t stride,
                                   Vec (&y)[4]) {
  Vec upper[4], lower[4];
#pragma GCC unroll 4
  for (int64_t f = 0; f < 4; ++f) {
    const float* at = from + f * stride + (f == 1 ? lanes.column : lanes.plain);
    const int64_t second =
        4 * stride + (f == 1 ? lanes.both - lanes.column : lanes.row - lanes.plain);
    const Vec m1 = load(at + second), m2 = load(at + 8 * stride);
    upper[f] = load(at) + m1 + m2;
    lower[f] = m1 - m2 - load(at + 12 * stride);
  }
  y[0] = upper[0] + upper[1] + upper[2];
  y[1] = upper[1] - upper[2] - upper[3];
  y[2] = lower[0] + lower[1] + lower[2];
  y[3] = lower[1] - lower[2] - lower[3];
}

// A row of tiles of the large image; y is where it begins.
void write_row(const UpconvSizes& n, const Plane& products, int64_t tile, int64_t row, float* y) {
  const int64_t run = n.run(), line = n.line(), across = n.across();
  const int64_t inside = whole_tiles(n, row), stride = products.stride;
  for (int64_t parity = 0; parity < 2; ++parity) {
    for (int64_t r = 0; r < run; r += kVec) {
      const int64_t column = column_of(run, r);
      const Places lanes = places_of(n, parity, column);
      const float* from = products.at(0) + tile * products.row;
      float* to = y + parity * line + column;
      Vec results[4];
      int64_t j = 0;
      for (; j < inside; ++j, from += products.row, to += 2 * run) {
        transform_products(from, lanes, stride, results);
        __builtin_prefetch(to + 4 * line, 1);  // where the next row of tiles goes
        __builtin_prefetch(to + 6 * line, 1);
        store(to, results[0]);
        store(to + run, results[1]);
        store(to + 2 * line, results[2]);
        store(to + 2 * line + run, results[3]);
      }
      for (; j < across; ++j, from += products.row, to += 2 * run) {
        transform_products(from, lanes, stride, results);
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t p = i >> 1, q = i & 1;
          if (2 * row + p >= n.height || 2 * j + q >= n.width) continue;
          for (int64_t u = 0; u < kVec && u < run; ++u) {
            to[2 * p * line + q * run + u] = results[i][u];
          }
        }
      }
    }
  }
}

// Where the gradients of a tile go, one after the other, in each kind of frequency.
struct Targets {
  float *plain, *column, *row, *both;
  Places step, parity;  // to the next tile, to the odd rows
  bool again;           // the other column parity has been there before
  FWM_INLINE Targets(const UpconvSizes& n, const Plane& products, int64_t tile, int64_t first)
      : step{lanes_of(n, 0), lanes_of(n, 1), lanes_of(n, 4), lanes_of(n, 5)},
        again(shares_columns(n) && first >= n.outputs) {
    const Places even = places_of(n, 0, first), odd = places_of(n, 1, first);
    plain = products.at(0) + tile * step.plain + even.plain;
    column = products.at(1) + tile * step.column + even.column;
    row = products.at(4) + tile * step.row + even.row;
    both = products.at(5) + tile * step.both + even.both;
    parity = {odd.plain - even.plain, odd.column - even.column, 0, 0};
  }
  FWM_INLINE void next() {
    plain += step.plain, column += step.column, row += step.row, both += step.both;
  }
};

// Gradients [parity][pixel] of 2x2 pixels: the transposed map of transform_products.
FWM_INLINE void transform_gradients(const Vec (&g)[2][4], const Targets& to, int64_t stride) {
  const auto put = [&to, stride](float* at, float* second, Vec left, Vec right) {
    store(at, left);
    store(second, to.again ? load(second) + (left + right) : left + right);
    store(at + 2 * stride, left - right);
    store(at + 3 * stride, -right);
  };
#pragma GCC unroll 2
  for (int64_t parity = 0; parity < 2; ++parity) {
    const Vec* p = g[parity];
    float *at = to.plain + parity * to.parity.plain,
          *second = to.column + parity * to.parity.column;
    put(at, second, p[0], p[1]);
    put(at + 8 * stride, second + 8 * stride, p[0] - p[2], p[1] - p[3]);
    put(at + 12 * stride, second + 12 * stride, -p[2], -p[3]);
  }
  put(to.row, to.both, g[0][0] + g[0][2] + (g[1][0] + g[1][2]),
      g[0][1] + g[0][3] + (g[1][1] + g[1][3]));
}

// A row of tiles of the large image's gradient, which begins at grad_y.
void read_row(const UpconvSizes& n, const float* grad_y, int64_t row, const Plane& products,
              int64_t tile) {
  const int64_t run = n.run(), line = n.line(), across = n.across();
  const int64_t inside = whole_tiles(n, row), stride = products.stride;
  for (int64_t r = 0; r < run; r += kVec) {
    const int64_t column = column_of(run, r);
    Targets to(n, products, tile, column);
    const float* from = grad_y + column;
    Vec g[2][4];
    int64_t j = 0;
    for (; j < inside; ++j, from += 2 * run, to.next()) {
#pragma GCC unroll 2
      for (int64_t parity = 0; parity < 2; ++parity) {
        const float* at = from + parity * line;
        __builtin_prefetch(at + 4 * line);
        __builtin_prefetch(at + 6 * line);
        g[parity][0] = load(at);
        g[parity][1] = load(at + run);
        g[parity][2] = load(at + 2 * line);
        g[parity][3] = load(at + 2 * line + run);
      }
      transform_gradients(g, to, stride);
    }
    for (; j < across; ++j, from += 2 * run, to.next()) {
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t parity = i >> 2, p = i >> 1 & 1, q = i & 1;
        Vec edge = {};
        const bool valid = 2 * row + p < n.height && 2 * j + q < n.width;
        for (int64_t u = 0; u < kVec && u < run && valid; ++u) {
          edge[u] = from[(2 * p + parity) * line + q * run + u];
        }
        g[parity][2 * p + q] = edge;
      }
      transform_gradients(g, to, stride);
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
void gather_rows(const UpconvSizes& n, const Lines& from, int64_t row, float* carry,
                 float* grad_x) {
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

void normalise(const UpconvNorm& norm, int64_t channels, const float* y, int64_t pixels, float* z) {
#define FWM_FORM(width) rms_silu_rows<width>(y, norm.scale, channels, norm.eps, pixels, z)
  FWM_FOR_WIDTH(channels, FWM_FORM)
#undef FWM_FORM
}

// Adds to grad_scale.
void normalise_backward(const UpconvNorm& norm, int64_t channels, const float* y,
                        const float* grad_z, int64_t pixels, float* grad_y, float* grad_scale){
#define FWM_FORM(width)                                                                    \
  rms_silu_rows_backward<width>(y, norm.scale, grad_z, channels, norm.eps, pixels, grad_y, \
                                grad_scale)
    FWM_FOR_WIDTH(channels, FWM_FORM)
#undef FWM_FORM
}

// Where the row of tiles q begins in (N, 2H, 2W, C').
FWM_INLINE int64_t begin_of(const UpconvSizes& n, int64_t q) {
  return (q / n.down() * 2 * n.height + q % n.down() * 4) * n.line();
}

}  // namespace

void upconv(const Upconv& a, float* scratch, float* y, float* z, int64_t begin, int64_t end) {
  const UpconvSizes& n = a.n;
  Room room{scratch};
  const Lines lines(room, n);
  const Plane values(room, n.tiles(), n.inputs);
  const Plane products(room, n.tiles(), whole(4 * n.outputs));
  float* large = room.take(apart(4 * n.line()));
  const int64_t step = n.inputs * whole(4 * n.outputs), last = end * n.down();
  for (int64_t first = begin * n.down(); first < last; first += n.rows()) {
    const int64_t rows = last - first < n.rows() ? last - first : n.rows();
    transform_image(n, lines, values, a.x, first, rows);
    for (int64_t f = 0; f < kFrequencies; ++f) {
      const Factor x{values.at(f), n.inputs, 1};
      // A bias of the products at (1, 1) is one of every result.
      const float* init = f == 5 ? a.packed + kFrequencies * step : nullptr;
      multiply(x, n.inputs, a.packed + f * step, lanes_of(n, f), init, products.at(f), products.row,
               rows * n.across());
    }
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t row = (first + q) % n.down(), at = begin_of(n, first + q);
      float* to = y ? y + at : large;
      write_row(n, products, q * n.across(), row, to);
      if (a.norm.scale) normalise(a.norm, n.outputs, to, n.pixels(row), z + at);
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
  float* large = room.take(apart(4 * n.line()));
  const int64_t step = n.inputs * whole(4 * n.outputs), turn = 4 * n.outputs * whole(n.inputs);
  const int64_t last = end * n.down();
  for (int64_t i = 0; i < n.sums() && (a.want_weight || a.y); ++i) sums[i] = 0.0f;
  for (int64_t first = begin * n.down(); first < last; first += n.rows()) {
    const int64_t rows = last - first < n.rows() ? last - first : n.rows();
    const int64_t tiles = rows * n.across();
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t row = (first + q) % n.down(), at = begin_of(n, first + q);
      if (a.y) {
        normalise_backward(a.norm, n.outputs, a.y + at, a.grad + at, n.pixels(row), large,
                           sums + n.packed());
      }
      read_row(n, a.y ? large : a.grad + at, row, products, q * n.across());
    }
    if (a.want_weight) {
      transform_image(n, lines, values, a.x, first, rows);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        const Factor x{values.at(f), 1, n.inputs};
        add_product(x, tiles, products.at(f), lanes_of(n, f), sums + f * step, whole(4 * n.outputs),
                    n.inputs);
      }
      float* bias = sums + kFrequencies * step;
      const float* all = products.at(5);
      for (int64_t i = 0; i < lanes_of(n, 5); i += kVec) {
        Vec sum = load(bias + i);
        for (int64_t t = 0; t < tiles; ++t) sum += load(all + t * lanes_of(n, 5) + i);
        store(bias + i, sum);
      }
    }
    if (!a.turned) continue;
    for (int64_t f = 0; f < kFrequencies; ++f) {
      const Factor g{products.at(f), lanes_of(n, f), 1};
      multiply(g, lanes_of(n, f), a.turned + f * turn, n.inputs, nullptr, grads.at(f), grads.row,
               tiles);
    }
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t image = (first + q) / n.down(), row = (first + q) % n.down();
      gather_columns(n, gathered, grads, q * n.across());
      gather_rows(n, gathered, row, carry, grad_x + image * n.height * lines.inner);
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
