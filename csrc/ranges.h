// Sums over rows that do not depend on the number of threads: the rows (or images) are cut into
// ranges, each with sums of its own, and those are added in order. Two runs are equal bit by bit on
// any machine.
#pragma once

#include "tensor.h"

namespace fastwm {

struct Ranges {
  int64_t length, count;
  explicit Ranges(int64_t rows, int64_t least = 1)  // rows of a range, if there are so many
      : length(std::max<int64_t>(least, (rows + 15) / 16)),
        count(std::max<int64_t>(1, (rows + length - 1) / length)) {}

  template <class F>
  void run(int64_t rows, int64_t cost, const F& f) const {
    parallel(count, cost * length, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i * length, std::min(rows, (i + 1) * length));
    });
  }
};

// The first range's sums, with all others added.
inline const float* total(float* parts, const Ranges& ranges, int64_t size) {
  for (int64_t i = 1; i < ranges.count; ++i) {
    for (int64_t u = 0; u < size; ++u) parts[u] += parts[i * size + u];
  }
  return parts;
}

}  // namespace fastwm
