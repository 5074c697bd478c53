// A 5 x 5 convolution, 2x2 max pooling, bias, RMSNorm and SiLU, without the convolution's result:
// squares of results that are pooled together lie in SIMD lanes, a line of them at a time.
//
// Along a line the two results of a square are made of six products instead of ten (the scheme of
// Toom, Cook and Winograd on the points 0, 1, -1, 1/2, -1/2 and infinity): six sums of six
// neighbouring pixels times six sums of five neighbouring weights, summed over the channels and the
// kernel's rows before they become two results. So six dense products of depth 5 C take the place
// of one of depth 25 C with two columns. The error grows by half: 4e-7 of the result instead of
// 2.6e-7 at C = 8. Where pixels of a line are equal, five of six sums are exactly zero, and equal
// results stay equal.
#ifndef FWM_ISA
#include "cpu/pool.h"

#include "cpu/lanes.h"
#include "cpu/norm_rows.h"
#include "cpu/simd.h"

namespace fastwm {
namespace {

constexpr int64_t kPoints = 6, kKernel = 5;
constexpr int64_t kUnits = 2;     // vectors of squares that one pass over the weights serves
constexpr int64_t kEdge = 16;     // numbers before the first pixel of a plane: the last is read
constexpr int64_t kBand = 24576;  // so many turned numbers at a time stay in L2

// So many outputs share what is loaded: three have their sums in registers, with four vectors of
// results each; four are better cut in half.
inline int64_t group(int64_t left) { return left == 4 ? 2 : left < 3 ? left : 3; }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace
}  // namespace fastwm

#define FWM_SOURCE "cpu/pool_stage.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

PoolStagePlan pool_stage_plan(const PoolStage& a) { return FWM_CALL(pool_stage_plan)(a); }

// weight (C', C, 5, 5) as (6, groups of outputs, 5 rows, C, outputs of the group).
void pool_stage_pack(const PoolStage& a, const float* weight, float* packed) {
  const int64_t channels = a.n.channels, next = kKernel * a.inputs * channels;
  for (int64_t first = 0; first < channels; first += group(channels - first)) {
    const int64_t wide = group(channels - first);
    for (int64_t row = 0; row < kKernel; ++row) {
      for (int64_t c = 0; c < a.inputs; ++c) {
        for (int64_t o = 0; o < wide; ++o, ++packed) {
          const float* w = weight + (((first + o) * a.inputs + c) * kKernel + row) * kKernel;
          const double even = (16.0 * w[0] + 4.0 * w[2] + w[4]) * (-1.0 / 6.0);
          const double odd = (4.0 * w[1] + w[3]) * (-1.0 / 3.0),
                       sides = 2.0 / 3.0 * (1.0 * w[1] + w[3]);
          const double middle = 2.0 / 3.0 * (1.0 * w[0] + w[2] + w[4]);
          packed[0] = 4.0f * w[0];
          packed[next] = static_cast<float>(middle + sides);
          packed[2 * next] = static_cast<float>(middle - sides);
          packed[3 * next] = static_cast<float>(even + odd);
          packed[4 * next] = static_cast<float>(even - odd);
          packed[5 * next] = w[4];
        }
      }
    }
  }
}

void pool_stage(const PoolStage& a, float* scratch, const PoolStageResults& to, int64_t begin,
                int64_t end) {
  FWM_CALL(pool_stage)(a, scratch, to, begin, end);
}

}  // namespace fastwm

#else

#include "cpu/vec.h"

namespace fastwm::FWM_ISA {
namespace {

constexpr int64_t kSums = 2 * kUnits;  // vectors of results: two lines of each unit

// One worker's memory. Where an image is narrower than a vector, several lie side by side.
struct Desk {
  int64_t images, line, plane, band, rows;  // rows of turned pixels: two a pooled row, and four
  float* pixels;                            // a line of an image and zeros
  float* planes;      // (images, 2 C, plane): even and odd columns of each channel
  float* turned;      // (6, rows, C, line): sums of six pixels
  float* products;    // (6, C', 4 vectors)
  float* best;        // (C', vector)
  float* from;        // (C', vector): integers
  int64_t size = 16;  // of all of them, and what comes before the first whole cache line

  // Without memory: how much is needed.
  Desk(const PoolStage& a, float* memory) {
    const int64_t columns = a.n.columns(), channels = a.n.channels;
    images = columns < kVec ? kVec / columns : 1;
    line = round_up(images * columns, kVec);
    plane = kEdge + round_up(line, 8) + 16;
    // An even number of rows: two units are always in it.
    const int64_t fit = kBand / (kPoints * 4 * a.inputs * line + 1) * 2;
    band = fit < 2 ? 2 : fit > a.n.rows() ? a.n.rows() : fit;
    rows = 2 * band + 4;
    if (memory) memory += (16 - reinterpret_cast<uintptr_t>(memory) / 4 % 16) % 16;
    const auto take = [&](int64_t count) {
      float* piece = memory;
      count = round_up(count, 16);
      if (memory) memory += count;
      size += count;
      return piece;
    };
    products = take(kPoints * channels * kSums * kVec);
    best = take(channels * kVec);
    from = take(channels * kVec);
    turned = take(kPoints * step(a));
    planes = take((images * 2 * a.inputs + 8) * plane);
    pixels = take(pixel_count(a));
  }
  int64_t row(const PoolStage& a) const { return a.inputs * line; }
  // From one of six sums to the next: a narrow image's last vector may end behind its line.
  int64_t step(const PoolStage& a) const { return rows * row(a) + kVec; }
  int64_t pixel_count(const PoolStage& a) const {
    return (round_up(line, 8) + 1) * 2 * a.inputs + 8;
  }
};

// A line of an image, as even and odd columns of each channel. Bytes count as byte / 255 - 1/2.
template <class T>
FWM_INLINE void split(const PoolStage& a, const Desk& desk, const T* x, float* planes) {
  const int64_t wide = 2 * a.inputs, n = a.n.width * a.inputs, plane = desk.plane;
  float* line = desk.pixels;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) line[i] = pixel(x[i]);
  const int64_t columns = round_up(desk.line, 8);
  for (int64_t first = 0; first < wide; first += 8) {
    // The last channels again rather than less than eight of them; of few the rest is not read.
    const int64_t channel = wide < 8 ? 0 : first + 8 > wide ? wide - 8 : first;
    for (int64_t j = 0; j < columns; j += 8) {
      const float* source[8];
      float* to[8];
      for (int64_t i = 0; i < 8; ++i) {
        source[i] = line + (j + i) * wide + channel;
        to[i] = planes + (channel + i) * plane + kEdge + j;
      }
      turn8x8(source, to);
    }
  }
  for (int64_t c = 0; c < wide; ++c) {
    planes[c * plane + kEdge + columns] = line[columns * wide + c];
  }
}

// Line `line` of `count` images as the products read it, in row `place`.
FWM_INLINE void turn(const PoolStage& a, const Desk& desk, int64_t count, int64_t place) {
  const int64_t columns = a.n.columns(), step = desk.step(a), plane = desk.plane;
  for (int64_t c = 0; c < a.inputs; ++c) {
    for (int64_t image = 0; image < count; ++image) {
      const float* even = desk.planes + (2 * image * a.inputs + c) * plane + kEdge;
      const float* odd = even + a.inputs * plane;
      float* to = desk.turned + place * desk.row(a) + c * desk.line + image * columns;
      for (int64_t j = 0; j < columns; j += kVec, to += kVec) {
        const Vec d0 = load(even + j - 1), d1 = load(odd + j - 1), d2 = load(even + j);
        const Vec d3 = load(odd + j), d4 = load(even + j + 1), d5 = load(odd + j + 1);
        const Vec evens = d4 - d2, odds = d3 - d1, half = 0.5f * odds;
        const Vec one = d4 - 0.25f * d2, two = d3 - 0.25f * d1;
        store(to, evens - 0.25f * (d2 - d0));
        store(to + step, one + two);
        store(to + 2 * step, one - two);
        store(to + 3 * step, evens + half);
        store(to + 4 * step, evens - half);
        store(to + 5 * step, (d5 - d3) - 0.25f * odds);
      }
    }
  }
}

// sums (kOut, 4 vectors) of x (depth, line) at four places times weight (depth, kOut).
template <int kOut>
FWM_INLINE void multiply(const float* x, const int64_t* at, const float* weight, int64_t depth,
                         int64_t line, float* sums) {
  Vec sum[kOut][kSums] = {};
  const float *x1 = x + at[1], *x2 = x + at[2], *x3 = x + at[3];
  x += at[0];
  for (int64_t k = 0; k < depth; ++k) {
    const Vec v[kSums] = {load(x), load(x1), load(x2), load(x3)};
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) {
      const float w = weight[o];
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) sum[o][i] += w * v[i];
    }
    x += line, x1 += line, x2 += line, x3 += line, weight += kOut;
  }
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kSums; ++i) store(sums + (o * kSums + i) * kVec, sum[o][i]);
  }
}

// The six products of two units of squares, all outputs.
FWM_INLINE void multiply_all(const PoolStage& a, const Desk& desk, const int64_t* at) {
  const int64_t depth = kKernel * a.inputs, step = desk.step(a);
  const float* weight = a.weight;
  float* sums = desk.products;
  for (int64_t p = 0; p < kPoints; ++p) {
    const float* x = desk.turned + p * step;
    for (int64_t o = 0; o < a.n.channels;) {
      const int64_t wide = group(a.n.channels - o);
      if (wide == 3) multiply<3>(x, at, weight, depth, desk.line, sums);
      if (wide == 2) multiply<2>(x, at, weight, depth, desk.line, sums);
      if (wide == 1) multiply<1>(x, at, weight, depth, desk.line, sums);
      o += wide, weight += wide * depth, sums += wide * kSums * kVec;
    }
  }
}

// The largest of a square's four results plus bias, and which it was, for every output.
FWM_INLINE void pool(const PoolStage& a, const Desk& desk, int64_t unit, float* best, float* from) {
  const int64_t next = a.n.channels * kSums * kVec;
  for (int64_t o = 0; o < a.n.channels; ++o) {
    const float* product = desk.products + (o * kSums + 2 * unit) * kVec;
    Vec most{};
    Bits place{};
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row, product += kVec) {
      const Vec m0 = load(product), m1 = load(product + next), m2 = load(product + 2 * next);
      const Vec m3 = load(product + 3 * next), m4 = load(product + 4 * next);
      const Vec m5 = load(product + 5 * next);
      const Vec result[2] = {m0 + (m1 + m2) + (m3 + m4), (m1 - m2) + 0.5f * (m3 - m4) + m5};
#pragma GCC unroll 2
      for (int column = 0; column < 2; ++column) {
        const Vec y = result[column];
        if (row + column == 0) {
          most = y;
          continue;
        }
        // The first of equals wins, NaN wins over all, as in PyTorch.
        const Bits more = (y > most) | (y != y);
        most = more ? y : most;
        place = more ? Bits{} + (2 * row + column) : place;
      }
    }
    store(best + o * kVec, most + a.bias[o]);
    *(Bits*)(from + o * kVec) = place;
  }
}

// Channels of kVec pixels (C', kVec) -> pixels (count, C').
FWM_INLINE void lay_out(const float* x, int64_t channels, int64_t count, float* out) {
  if (kVec < 8 || channels < 8 || count < kVec) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = x[c * kVec + i];
    }
    return;
  }
  for (int64_t first = 0; first < channels; first += 8) {
    const int64_t channel = first + 8 > channels ? channels - 8 : first;
    for (int64_t j = 0; j < kVec; j += 8) {
      const float* source[8];
      float* to[8];
      for (int64_t i = 0; i < 8; ++i) {
        source[i] = x + (channel + i) * kVec + j;
        to[i] = out + (j + i) * channels + channel;
      }
      turn8x8(source, to);
    }
  }
}

FWM_INLINE void lay_out(const int32_t* x, int64_t channels, int64_t count, uint8_t* out) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    const int32_t* from = x + c * kVec;
    int32_t four[kVec];
#pragma omp simd
    for (int64_t i = 0; i < kVec; ++i) {
      four[i] = from[i] | from[kVec + i] << 8 | from[2 * kVec + i] << 16 | from[3 * kVec + i] << 24;
    }
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(out + i * channels + c, four + i, 4);
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i)
      out[i * channels + c] = static_cast<uint8_t>(x[c * kVec + i]);
  }
}

// The norm over channels and SiLU of kVec pixels, in place.
FWM_INLINE void finish(const PoolStage& a, float* x) {
  Vec squares{};
  for (int64_t c = 0; c < a.n.channels; ++c) squares += load(x + c * kVec) * load(x + c * kVec);
  float inverse[kVec];
#pragma omp simd
  for (int64_t i = 0; i < kVec; ++i) {
    inverse[i] = 1.0f / sqrtf(squares[i] / static_cast<float>(a.n.channels) + a.n.eps);
  }
  for (int64_t c = 0; c < a.n.channels; ++c) {
    float* to = x + c * kVec;
    const float scale = a.scale[c];
#pragma omp simd
    for (int64_t i = 0; i < kVec; ++i) to[i] = silu(to[i] * inverse[i] * scale);
  }
}

// Rows of turned pixels for the pooled rows [first, first + count): those of the band before that
// are still needed, and new ones.
FWM_INLINE void turn_band(const PoolStage& a, const Desk& desk, int64_t image, int64_t images,
                          int64_t first, int64_t count) {
  const int64_t step = desk.step(a), row = desk.row(a), numbers = a.n.width * a.inputs;
  for (int64_t p = 0; p < kPoints && first > 0; ++p) {
    float *to = desk.turned + p * step, *last = to + 2 * desk.band * row;
    for (int64_t i = 0; i < 4 * row; ++i) to[i] = last[i];
  }
  for (int64_t r = first == 0 ? 0 : 4; r < 2 * count + 4; ++r) {
    const int64_t line = 2 * first - 2 + r;
    if (line < 0 || line >= a.n.height) {
      for (int64_t p = 0; p < kPoints; ++p) {
        float* to = desk.turned + p * step + r * row;
        for (int64_t i = 0; i < row; ++i) to[i] = 0.0f;
      }
      continue;
    }
    for (int64_t i = 0; i < images; ++i) {
      const int64_t at = ((image + i) * a.n.height + line) * numbers;
      float* planes = desk.planes + i * 2 * a.inputs * desk.plane;
      if (a.bytes) split(a, desk, a.bytes + at, planes);
      if (a.x) split(a, desk, a.x + at, planes);
    }
    turn(a, desk, images, r);
  }
}

// Writes what `unit`, of two in desk.products, has become: pixels from j on of pooled row i.
FWM_INLINE void write_unit(const PoolStage& a, const Desk& desk, int64_t unit, int64_t image,
                           int64_t images, int64_t i, int64_t j, const PoolStageResults& to) {
  const int64_t channels = a.n.channels, columns = a.n.columns();
  const int64_t count = columns - j < kVec ? columns - j : kVec;
  const int64_t pixel = ((image * a.n.rows() + i) * columns + j) * channels;
  const int64_t next = a.n.pixels() * channels;
  pool(a, desk, unit, desk.best, desk.from);
  for (int64_t k = 0; k < images; ++k) {
    const int32_t* from = reinterpret_cast<const int32_t*>(desk.from) + k * columns;
    lay_out(desk.best + k * columns, channels, count, to.pooled + pixel + k * next);
    lay_out(from, channels, count, to.index + pixel + k * next);
  }
  finish(a, desk.best);
  for (int64_t k = 0; k < images; ++k) {
    lay_out(desk.best + k * columns, channels, count, to.y + pixel + k * next);
  }
}

// One image, or several narrow ones.
FWM_INLINE void stage(const PoolStage& a, const Desk& desk, int64_t image, int64_t images,
                      const PoolStageResults& to) {
  const int64_t units = desk.line / kVec, row = desk.row(a);
  for (int64_t first = 0; first < a.n.rows(); first += desk.band) {
    const int64_t count = a.n.rows() - first < desk.band ? a.n.rows() - first : desk.band;
    turn_band(a, desk, image, images, first, count);
    for (int64_t unit = 0; unit < count * units; unit += kUnits) {
      int64_t at[kSums], here = unit;
      for (int64_t u = 0; u < kUnits; ++u) {
        if (unit + u < count * units) here = unit + u;  // without a second one, the first again
        at[2 * u] = here / units * 2 * row + here % units * kVec;
        at[2 * u + 1] = at[2 * u] + row;
      }
      multiply_all(a, desk, at);
      for (here = unit; here < unit + kUnits && here < count * units; ++here) {
        write_unit(a, desk, here - unit, image, images, first + here / units, here % units * kVec,
                   to);
      }
    }
  }
}

}  // namespace

PoolStagePlan pool_stage_plan(const PoolStage& a) {
  const Desk desk(a, nullptr);
  return {desk.size, desk.images};
}

void pool_stage(const PoolStage& a, float* scratch, const PoolStageResults& to, int64_t begin,
                int64_t end) {
  const Desk desk(a, scratch);
  for (float* x = desk.turned; x < desk.pixels + desk.pixel_count(a); ++x) *x = 0.0f;
  for (int64_t image = begin; image < end; image += desk.images) {
    stage(a, desk, image, end - image < desk.images ? end - image : desk.images, to);
  }
}

}  // namespace fastwm::FWM_ISA

#endif
