// Nearest-neighbour upsampling by two, a 5x5 convolution and perhaps RMSNorm and SiLU after it:
// plain pointers and sizes, see kernels.h. Images lie (H, W, C).
//
// Each output phase (row parity a, column parity b) is a 3x3 convolution of the small image. Tiles
// of 2x2 input pixels, all phases of which need 4x4 input pixels, go through Winograd's
// F(2x2, 3x3): sixteen products per tile, kernel and channel instead of 36 for each phase. The
// second of four frequencies along a dimension is the same for both parities, and is multiplied
// once: always along the rows, and along the columns where C' is a number of whole vectors.
#pragma once

#include <stdint.h>

namespace fastwm {

constexpr int64_t kFrequencies = 16;  // 4 along the rows times 4 along the columns

// Rows of whole vectors of any width; rows that do not begin in the same set of the cache, and with
// room for what a vector spills.
inline int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }
inline int64_t apart(int64_t n) { return whole(n) + 16; }

struct UpconvSizes {
  int64_t height, width, inputs, outputs;  // H, W, C, C'
  int64_t down() const { return (height + 1) / 2; }
  int64_t across() const { return (width + 1) / 2; }  // tiles of an image
  int64_t run() const { return 2 * outputs; }  // contiguous results of an input pixel, (b, C')
  // Floats of a row of the large image, and pixels that a row of tiles has there.
  int64_t line() const { return width * run(); }
  int64_t pixels(int64_t row) const { return 4 * width * (2 * row + 1 < height ? 2 : 1); }
  // Rows of tiles that take all steps together: few enough for L1, enough to fill registers.
  int64_t rows() const { return across() < 32 ? 32 / across() : 1; }
  int64_t tiles() const { return rows() * across(); }
  // Floats, whatever the instruction set: kernel and bias as the forward pass reads them, the
  // kernel as the gradient of x does; gradients of kernel, bias and scale; and what a thread works
  // in.
  int64_t packed() const { return (kFrequencies * inputs + 1) * whole(4 * outputs); }
  int64_t turned() const { return kFrequencies * 4 * outputs * whole(inputs); }
  int64_t sums() const { return packed() + outputs; }
  int64_t scratch() const;
};

// The norm over the channels of each pixel that follows; without scale nothing does.
struct UpconvNorm {
  const float* scale;  // (C')
  float eps;
};

struct Upconv {
  const float* x;       // (N, H, W, C)
  const float* packed;  // by upconv_pack
  UpconvNorm norm;
  UpconvSizes n;
};
// weight (C', C, 5, 5), bias (C') or null.
void upconv_pack(const UpconvSizes& n, const float* weight, const float* bias, float* packed);
// Of images [begin, end): y (N, 2H, 2W, C') by the convolution, and z by the norm and SiLU. With a
// norm y may be null.
void upconv(const Upconv& a, float* scratch, float* y, float* z, int64_t begin, int64_t end);

struct UpconvGrad {
  const float* grad;    // (N, 2H, 2W, C'), of z or, without a norm, of y
  const float* y;       // (N, 2H, 2W, C'), with a norm
  const float* x;       // (N, H, W, C)
  const float* turned;  // by upconv_turn; null: no gradient of x is wanted
  bool want_weight;     // else sums are left alone, without a norm
  UpconvNorm norm;
  UpconvSizes n;
};
void upconv_turn(const UpconvSizes& n, const float* weight, float* turned);
// sums is overwritten with what images [begin, end) give; upconv_fold makes gradients of it. The
// last C' of sums are the gradient of scale.
void upconv_backward(const UpconvGrad& a, float* scratch, float* grad_x, float* sums, int64_t begin,
                     int64_t end);
void upconv_fold(const UpconvSizes& n, const float* sums, float* grad_weight, float* grad_bias);

}  // namespace fastwm
