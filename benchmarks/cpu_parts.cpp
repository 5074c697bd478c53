// Where the nanoseconds of twohot_loss, kl_balance and a step of the sequence go on a CPU: their parts
// alone, in cache, and the whole kernels. From the checkout:
//   g++ -std=c++20 -O3 -fno-math-errno -fno-trapping-math -fopenmp-simd -Icsrc benchmarks/cpu_parts.cpp \
//     csrc/cpu/twohot.cpp csrc/cpu/latent.cpp csrc/cpu/latent_kl.cpp csrc/cpu/dispatch.cpp -o cpu_parts
//   ./cpu_parts        FASTWM_CPU_CAPABILITY=default: without AVX2
// CPU time of this thread, least of many runs, so that it can be read on a busy machine as well.
#ifndef FWM_ISA
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/latent.h"
#include "cpu/simd.h"
#include "cpu/softmax.h"
#include "cpu/twohot.h"
#define FWM_SOURCE "../benchmarks/cpu_parts.cpp"
#include "cpu/each_isa.h"

using namespace fastwm;

static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

template <class F>
static void show(const char* name, int64_t numbers, const F& call) {
  double best = 1e9;
  for (int run = 0; run < 40; ++run) {
    const double start = now();
    for (int i = 0; i < 8; ++i) call();
    best = std::min(best, now() - start);
  }
  printf("%-44s %7.3f ns a number\n", name, best / 8 * 1e9 / (double)numbers);
}

static std::vector<float> random_floats(int64_t count, float most) {
  std::vector<float> x((size_t)count);
  for (float& value : x) value = most * ((float)rand() / (float)RAND_MAX * 2.0f - 1.0f);
  return x;
}

static void whole_twohot(int64_t rows) {
  constexpr int64_t V = 255;
  std::vector<float> x = random_floats(rows * V, 3.0f), target = random_floats(rows, 10.0f);
  std::vector<float> bins(V), loss((size_t)rows), sum((size_t)rows), grad((size_t)rows, 1.0f);
  std::vector<float> out(x.size());
  for (int64_t v = 0; v < V; ++v) bins[(size_t)v] = symexp(-20.0f + 40.0f / 254.0f * (float)v);
  TwohotLoss a{x.data(), bins.data(), {target.data(), nullptr}, {1.0f, 0.0f}, grad.data(), sum.data(),
               V};
  printf("twohot_loss, N %ld, V %ld\n", (long)rows, (long)V);
  show("  forward", rows * V, [&] { twohot_loss(a, loss.data(), sum.data(), 0, rows); });
  show("  backward", rows * V, [&] { twohot_loss_backward(a, out.data(), 0, rows); });
  show("  a copy of the logits", rows * V, [&] { std::copy(x.begin(), x.end(), out.begin()); });
}

static void whole_kl(int64_t rows, int64_t classes) {
  const int64_t groups = 32, row = groups * classes, count = rows * row;
  std::vector<float> p = random_floats(count, 4.0f), q = random_floats(count, 4.0f);
  std::vector<float> to_p(p.size()), to_q(p.size()), out((size_t)(4 * rows)), ones((size_t)rows, 1.0f);
  const KlBalance a{p.data(), q.data(), groups, classes, 0.01f, 1.0f};
  float* o = out.data();
  const KlOutputs none{o, o + rows, o + 2 * rows, o + 3 * rows, nullptr, nullptr};
  const KlOutputs both{o, o + rows, o + 2 * rows, o + 3 * rows, to_p.data(), to_q.data()};
  printf("kl_balance, N %ld, 32 x %ld, a pair of classes\n", (long)rows, (long)classes);
  show("  forward without gradient", count, [&] { kl_balance(a, none, 0, rows); });
  show("  forward with both slopes", count, [&] { kl_balance(a, both, 0, rows); });
  show("  backward: two arrays scaled", count, [&] {
    scale_rows(ones.data(), to_p.data(), p.data(), row, 0, rows);
    scale_rows(ones.data(), to_q.data(), q.data(), row, 0, rows);
  });
}

// What a step of size12m multiplies: 16 rows with 17.8 MB of packed weights, again and again.
static void step_product(int64_t rows) {
  constexpr int64_t depth = 2048, columns = 2176;
  std::vector<float> weights = random_floats(depth * columns, 0.1f);
  std::vector<float> x = random_floats(rows * depth, 1.0f), y((size_t)(rows * columns));
  printf("product of %ld rows with 17.8 MB of packed weights\n", (long)rows);
  show("  a multiply-add", rows * depth * columns, [&] {
    FWM_CALL(panels)(weights.data(), x.data(), y.data(), rows, depth, columns);
  });
}

int main() {
  constexpr int64_t N = 4096;
  std::vector<float> x = random_floats(N, 4.0f), y(N), negative(N), positive(N);
  for (size_t i = 0; i < N; ++i) negative[i] = -fabsf(x[i]), positive[i] = fabsf(x[i]) + 1e-3f;
  volatile float keep = 0.0f;
  printf("parts, in cache\n");
  show("  exponential", N, [&] { FWM_CALL(map_exp)(negative.data(), y.data(), N); });
  show("  logarithm", N, [&] { FWM_CALL(map_log)(positive.data(), y.data(), N); });
  show("  division", N, [&] { FWM_CALL(map_ratio)(positive.data(), y.data(), N); });
  show("  load and store", N, [&] { FWM_CALL(map_add)(x.data(), y.data(), N); });
  show("  maximum of a row", N, [&] { keep = FWM_CALL(most)(x.data(), N); });
  show("  counting bins", N, [&] { keep = FWM_CALL(passed)(x.data(), N); });
  show("  turning 16 rows of 64, there and back", N, [&] { FWM_CALL(turn)(x.data(), N); });
  for (const int64_t rows : {64, 16384}) whole_twohot(rows);
  for (const int64_t classes : {16, 64}) {
    for (const int64_t rows : {32, 1024}) whole_kl(rows, classes);
  }
  step_product(16);
}

#else

#include "cpu/rssm_body.h"

#include "cpu/softmax_rows.h"

namespace fastwm::FWM_ISA {

#define FWM_MAP(name, expression)                                               \
  __attribute__((noinline)) void name(const float* from, float* to, int64_t n) { \
    for (int64_t i = 0; i < n; i += kVec) {                                     \
      const Vec x = load(from + i);                                             \
      store(to + i, expression);                                                \
    }                                                                           \
  }
FWM_MAP(map_exp, exp_nonpos(x))
FWM_MAP(map_log, log_positive(x))
FWM_MAP(map_ratio, x / (x + 0.5f))
FWM_MAP(map_add, x + 0.5f)
#undef FWM_MAP

__attribute__((noinline)) float most(const float* x, int64_t n) { return row_max(x, n); }

__attribute__((noinline)) float passed(const float* x, int64_t n) {
  return (float)row_count(x, 0.5f, n);
}

__attribute__((noinline)) void turn(float* x, int64_t n) {
  float lanes[65][kLanes];
  for (int64_t i = 0; i < n; i += 64 * kLanes) {
    turn_rows(x + i, 64, lanes);
    turn_rows_back(lanes, 64, x + i);
  }
}

__attribute__((noinline)) void panels(const float* weights, const float* x, float* y, int64_t rows,
                                      int64_t depth, int64_t columns) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const Target to{nullptr, 0, y + column, columns, kPanel};
    product(weights + column * depth, Part{x, depth, depth}, kNone, to, 0, rows);
  }
}

}  // namespace fastwm::FWM_ISA

#endif
