// The 5x5 kernels of upconv.cpp at the sixteen frequencies, and their gradients back from there.
// Output or input channels lie in SIMD lanes.
#ifndef FWM_ISA
#include "cpu/upconv.h"

#include "cpu/simd.h"
#define FWM_SOURCE "cpu/upconv_weight.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void upconv_pack(const UpconvSizes& n, const float* weight, const float* bias, float* packed) {
  FWM_CALL(upconv_pack)(n, weight, bias, packed);
}

void upconv_turn(const UpconvSizes& n, const float* weight, float* turned) {
  FWM_CALL(upconv_turn)(n, weight, turned);
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

constexpr int kTaps = 25;

// Five taps, `step` apart, along one dimension: they fall together on three pixels, in a way that
// depends on the parity, and these go through G of F(2, 3).
FWM_INLINE void transform(const Vec* taps, int64_t step, int parity, Vec (&out)[4]) {
  const Vec t1 = taps[step], t2 = taps[2 * step], t3 = taps[3 * step];
  const Vec before = parity ? taps[0] : taps[0] + t1;
  const Vec at = parity ? t1 + t2 : t2 + t3;
  const Vec behind = parity ? t3 + taps[4 * step] : taps[4 * step];
  out[0] = before;
  out[1] = 0.5f * (before + behind + at);
  out[2] = 0.5f * (before + behind - at);
  out[3] = behind;
}

// The transposed map, added to the taps.
FWM_INLINE void transform_back(const Vec (&f)[4], int64_t step, int parity, Vec* taps) {
  const Vec half = 0.5f * (f[1] + f[2]);
  const Vec before = f[0] + half, at = 0.5f * (f[1] - f[2]), behind = f[3] + half;
  taps[0] += before;
  taps[step] += parity ? at : before;
  taps[2 * step] += at;
  taps[3 * step] += parity ? behind : at;
  taps[4 * step] += behind;
}

// taps (5, 5) become out[frequency][2 a + b].
void transform_kernel(const Vec (&taps)[kTaps], Vec (&out)[kFrequencies][4]) {
  for (int b = 0; b < 2; ++b) {
    Vec half[4][5];  // frequencies along the columns, of each row
    for (int u = 0; u < 5; ++u) {
      Vec line[4];
      transform(taps + 5 * u, 1, b, line);
      for (int f = 0; f < 4; ++f) half[f][u] = line[f];
    }
    for (int a = 0; a < 2; ++a) {
      for (int f = 0; f < 4; ++f) {
        Vec line[4];
        transform(half[f], 1, a, line);
        for (int i = 0; i < 4; ++i) out[4 * i + f][2 * a + b] = line[i];
      }
    }
  }
}

void transform_kernel_back(const Vec (&grads)[kFrequencies][4], Vec (&taps)[kTaps]) {
  for (int i = 0; i < kTaps; ++i) taps[i] = Vec{};
  for (int b = 0; b < 2; ++b) {
    Vec half[4][5] = {};
    for (int a = 0; a < 2; ++a) {
      for (int f = 0; f < 4; ++f) {
        const int phase = 2 * a + b;
        const Vec line[4] = {grads[f][phase], grads[4 + f][phase], grads[8 + f][phase],
                             grads[12 + f][phase]};
        transform_back(line, 1, a, half[f]);
      }
    }
    for (int u = 0; u < 5; ++u) {
      const Vec line[4] = {half[0][u], half[1][u], half[2][u], half[3][u]};
      transform_back(line, 1, b, taps + 5 * u);
    }
  }
}

// Kernels that lie `step` apart, one per lane.
void load_taps(const float* weight, int64_t step, int64_t count, Vec (&taps)[kTaps]) {
  for (int i = 0; i < kTaps; ++i) taps[i] = Vec{};
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int i = 0; i < kTaps; ++i) taps[i][lane] = weight[lane * step + i];
  }
}

// Numbers (k, column), (k, column + 1), … of a matrix (depth, width) that lies in panels.
void put(float* packed, int64_t depth, int64_t width, int64_t k, int64_t column, const Vec& x,
         int64_t count) {
  const int64_t end = vectors(width) * kVec;
  for (int64_t lane = 0; lane < count; ++lane, ++column) {
    const int64_t first = column / kPanel * kPanel;
    const int64_t panel = end - first < kPanel ? end - first : kPanel;
    packed[first * depth + k * panel + column - first] = x[lane];
  }
}

FWM_INLINE int64_t lanes_left(int64_t count, int64_t first) {
  return count - first < kVec ? count - first : kVec;
}

}  // namespace

void upconv_pack(const UpconvSizes& n, const float* weight, const float* bias, float* packed) {
  const int64_t step = n.inputs * whole(4 * n.outputs);
  for (int64_t i = 0; i < n.packed(); ++i) packed[i] = 0.0f;
  for (int64_t o = 0; o < n.outputs; o += kVec) {
    const int64_t count = lanes_left(n.outputs, o);
    for (int64_t c = 0; c < n.inputs; ++c) {
      Vec taps[kTaps], kernel[kFrequencies][4];
      load_taps(weight + (o * n.inputs + c) * kTaps, n.inputs * kTaps, count, taps);
      transform_kernel(taps, kernel);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t i = 0; i * n.outputs < lanes_of(n, f); ++i) {
          put(packed + f * step, n.inputs, lanes_of(n, f), c, i * n.outputs + o,
              kernel[f][phase_of(n, f, i)], count);
        }
      }
    }
  }
  float* lanes = packed + kFrequencies * step;
  for (int64_t i = 0; i < n.run() && bias; ++i) lanes[i] = bias[i % n.outputs];
}

void upconv_turn(const UpconvSizes& n, const float* weight, float* turned) {
  const int64_t step = 4 * n.outputs * whole(n.inputs);
  for (int64_t i = 0; i < n.turned(); ++i) turned[i] = 0.0f;
  for (int64_t o = 0; o < n.outputs; ++o) {
    for (int64_t c = 0; c < n.inputs; c += kVec) {
      const int64_t count = lanes_left(n.inputs, c);
      Vec taps[kTaps], kernel[kFrequencies][4];
      load_taps(weight + (o * n.inputs + c) * kTaps, kTaps, count, taps);
      transform_kernel(taps, kernel);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        for (int64_t i = 0; i * n.outputs < lanes_of(n, f); ++i) {
          put(turned + f * step, lanes_of(n, f), n.inputs, i * n.outputs + o, c,
              kernel[f][phase_of(n, f, i)], count);
        }
      }
    }
  }
}

void upconv_fold(const UpconvSizes& n, const float* sums, float* grad_weight, float* grad_bias) {
  const int64_t width = whole(4 * n.outputs), step = n.inputs * width;
  const float* bias = sums + kFrequencies * step;
  for (int64_t o = 0; o < n.outputs; ++o) grad_bias[o] = bias[o] + bias[n.outputs + o];
  for (int64_t o = 0; o < n.outputs; o += kVec) {
    const int64_t count = lanes_left(n.outputs, o);
    for (int64_t c = 0; c < n.inputs; ++c) {
      Vec taps[kTaps], grads[kFrequencies][4] = {};  // what phases share counts once
      for (int64_t f = 0; f < kFrequencies; ++f) {
        const float* from = sums + f * step + c * width + o;
        for (int64_t i = 0; i * n.outputs < lanes_of(n, f); ++i) {
          grads[f][phase_of(n, f, i)] = load(from + i * n.outputs);
        }
      }
      transform_kernel_back(grads, taps);
      for (int64_t lane = 0; lane < count; ++lane) {
        float* to = grad_weight + ((o + lane) * n.inputs + c) * kTaps;
        for (int i = 0; i < kTaps; ++i) to[i] = taps[i][lane];
      }
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
