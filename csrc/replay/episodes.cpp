#include "episodes.h"

namespace fastwm::replay {

std::int64_t count_row(std::int64_t n, const float* reward, const bool* first, const bool* last,
                       double* score, std::int64_t* length, std::int64_t* ended) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    score[i] = (first[i] ? 0.0 : score[i]) + static_cast<double>(reward[i]);
    length[i] = first[i] ? 0 : length[i] + 1;
    ended[count] = i;
    count += last[i];
  }
  return count;
}

}  // namespace fastwm::replay
