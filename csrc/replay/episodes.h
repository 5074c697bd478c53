// Sums of rewards and lengths of the episodes that many environments play side by side.
#pragma once

#include <cstdint>

namespace fastwm::replay {

// One row of n environments: score and length (n) go on, from zero where `first`, the row of a
// reset, which no action led to. Writes the environments whose `last` is set to `ended` (n) and
// returns how many there are.
std::int64_t count_row(std::int64_t n, const float* reward, const bool* first, const bool* last,
                       double* score, std::int64_t* length, std::int64_t* ended);

}  // namespace fastwm::replay
