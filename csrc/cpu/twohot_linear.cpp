// A two-hot head with its linear layer. Its logits are four times as wide as what they come from: a
// few rows of them stay in cache while means, or gradients, are made of them.
#ifndef FWM_ISA
#include <initializer_list>

#include "cpu/simd.h"
#include "cpu/softmax.h"
#include "cpu/twohot.h"
#define FWM_SOURCE "cpu/twohot_linear.cpp"
#include "cpu/each_isa.h"

namespace fastwm {

void twohot_linear_pack(const TwohotLinear& a) { FWM_CALL(twohot_linear_pack)(a); }

void twohot_linear(const TwohotLinear& a, float* logits, float* mean, int64_t begin, int64_t end) {
  FWM_CALL(twohot_linear)(a, logits, mean, begin, end);
}

void twohot_linear_grad_pack(const TwohotLinearGrad& a) { FWM_CALL(twohot_linear_grad_pack)(a); }

void twohot_linear_backward(const TwohotLinearGrad& a, float* workspace, float* grad_x,
                            float* grad_weight, float* grad_bias, int64_t begin, int64_t end) {
  FWM_CALL(twohot_linear_backward)(a, workspace, grad_x, grad_weight, grad_bias, begin, end);
}

// Panels are at most 32 wide; their padding is counted for that width.
int64_t twohot_linear_packed_floats(int64_t count, int64_t inputs) {
  return (count + 31) / 32 * 32 * inputs + 16;
}

// Gradients of kMostRows rows of logits, and as many rows of one panel of x.
int64_t twohot_linear_workspace(const TwohotLinearGrad& a) {
  return kMostRows * ((a.loss.count + 15) / 16 * 16 + 16 + 32) + 32;
}

}  // namespace fastwm

#else

#include "cpu/rssm_body.h"
#include "cpu/softmax_rows.h"
#include "cpu/twohot_rows.h"

namespace fastwm::FWM_ISA {
namespace {

// Rows [begin, end) of x^T times a panel, x (depth, columns).
#define FWM_TURNED
#define FWM_R 1
#include "cpu/rssm_tile.h"
#define FWM_R FWM_ROWS
#include "cpu/rssm_tile.h"
#undef FWM_TURNED

FWM_INLINE void turned_product(const float* panel, const Part& x, const Target& to, int64_t rows) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) FWM_JOIN(turned, FWM_ROWS)(panel, x, to, row);
  for (; row < rows; ++row) turned1(panel, x, to, row);
}

}  // namespace

void twohot_linear_pack(const TwohotLinear& a) {
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, a.count, a.inputs);
  for (int64_t j = 0; j < panels.count(); ++j) {
    const float* source = a.weight + panels.column(j) * a.inputs;
    pack(panels.panel(j), 0, a.inputs, panels.width(j), source, a.inputs, 1);
  }
}

void twohot_linear(const TwohotLinear& a, float* logits, float* mean, int64_t begin, int64_t end) {
  constexpr int64_t kRoom = 25 * (1024 + 16);  // floats of logits: 25 rows of 1024, 95 of 255
  float room[kRoom], exps[kLocal];  // not in place: the last block of a row is read twice
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, a.count, a.inputs);
  const int64_t stride = logits == nullptr ? padded(a.count) : a.count;
  const int64_t fits = kRoom / padded(a.count), most = fits < kMostRows ? fits : kMostRows;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t rows = end - first < most ? end - first : most;
    float* out = logits == nullptr ? room : logits + first * stride;
    const Part x{a.x + first * a.inputs, a.inputs, a.inputs};
    for (int64_t j = 0; j < panels.count(); ++j) {
      const int64_t column = panels.column(j);
      const Target to{a.bias + column, 0, out + column, stride, panels.width(j)};
      product(panels.panel(j), x, kNone, to, 0, rows);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* x_row = out + row * stride;
      const float sum = row_exp(x_row, row_max(x_row, a.count), 1.0f, exps, a.count);
      mean[first + row] = mean_of(exps, a.bins, a.count) / sum;
    }
  }
}

void twohot_linear_grad_pack(const TwohotLinearGrad& a) {
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, a.inputs, a.loss.count);
  for (int64_t j = 0; j < panels.count(); ++j) {
    const float* source = a.weight + panels.column(j);
    pack(panels.panel(j), 0, a.loss.count, panels.width(j), source, 1, a.inputs);
  }
}

void twohot_linear_backward(const TwohotLinearGrad& a, float* workspace, float* grad_x,
                            float* grad_weight, float* grad_bias, int64_t begin, int64_t end) {
  const int64_t count = a.loss.count, inputs = a.inputs, stride = padded(count);
  Arena arena{a.packed};
  Packed panels;
  panels.place(arena, 1, inputs, count);
  float *grads = workspace, *panel = workspace + kMostRows * stride;
  for (int64_t first = begin; first < end; first += kMostRows) {
    const int64_t rows = end - first < kMostRows ? end - first : kMostRows;
    for (int64_t row = 0; row < rows; ++row) {
      float* grad = grads + row * stride;
      loss_grad(a.loss, first + row, grad);
#pragma omp simd
      for (int64_t v = 0; v < count; ++v) grad_bias[v] += grad[v];
    }
    for (int64_t j = 0; j < panels.count(); ++j) {
      const int64_t column = panels.column(j), width = panels.width(j);
      if (grad_x != nullptr) {
        const Target to{nullptr, 0, grad_x + first * inputs + column, inputs, width};
        product(panels.panel(j), Part{grads, stride, count}, kNone, to, 0, rows);
      }
      pack(panel, 0, rows, width, a.x + first * inputs + column, 1, inputs);
      const Target sums{grad_weight + column, inputs, grad_weight + column, inputs, width};
      turned_product(panel, Part{grads, stride, rows}, sums, count);
    }
  }
}

}  // namespace fastwm::FWM_ISA

#endif
