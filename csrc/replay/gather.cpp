#include "gather.h"

#include <algorithm>
#include <cstring>

namespace fastwm::replay {
namespace {

constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// Finalizer of splitmix64; fastwm/replay.py::_mix64 is the same function.
std::uint64_t mix64(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Uniform in [0, n): high word of a 64 x 64 bit product; its bias is below n / 2^64.
std::int64_t draw_below(Draws& draws, std::int64_t n) {
  const std::uint64_t word = mix64(draws.key + ++draws.done * kGolden);
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::int64_t>(static_cast<Wide>(word) * static_cast<std::uint64_t>(n) >> 64);
}

std::int64_t oldest_row(const Shape& shape, std::int64_t count) {
  return std::max<std::int64_t>(count - shape.length, 0);
}

std::int64_t windows_of(const Shape& shape, std::int64_t count) {
  return std::max<std::int64_t>(std::min(count, shape.length) - shape.rows, 0);
}

void drop_overwritten(const Shape& shape, const std::int64_t* count, std::int64_t* next,
                      Planned& planned) {
  const std::int64_t window = shape.rows + 1;
  for (std::int64_t env = 0; env < shape.envs; ++env) {
    const std::int64_t behind = oldest_row(shape, count[env]) - next[env];
    if (behind <= 0) continue;
    const std::int64_t lost = (behind + window - 1) / window;
    next[env] += lost * window;
    planned.dropped += lost;
  }
}

// The env whose next online window has waited longest; -1 if none is complete.
std::int64_t longest_waiting(const Shape& shape, const std::int64_t* count,
                             const std::int64_t* next) {
  std::int64_t best = -1;
  std::int64_t most = shape.rows;  // complete means count - next >= T + 1
  for (std::int64_t env = 0; env < shape.envs; ++env) {
    const std::int64_t ready = count[env] - next[env];
    if (ready > most) most = ready, best = env;
  }
  return best;
}

// memcpy that is one load and one store for flags, rewards and small actions.
void copy_record(std::uint8_t* to, const std::uint8_t* from, std::int64_t bytes) {
  switch (bytes) {
    case 1:
      *to = *from;
      return;
    case 4:
      std::memcpy(to, from, 4);
      return;
    case 8:
      std::memcpy(to, from, 8);
      return;
    case 16:
      std::memcpy(to, from, 16);
      return;
    default:
      std::memcpy(to, from, bytes);
  }
}

}  // namespace

std::int64_t window_count(const Shape& shape, const std::int64_t* count) {
  std::int64_t total = 0;
  for (std::int64_t env = 0; env < shape.envs; ++env) total += windows_of(shape, count[env]);
  return total;
}

Planned plan(const Shape& shape, const std::int64_t* count, std::int64_t* next, Draws& draws,
             std::int64_t batch, bool online, std::int64_t* ids) {
  Planned planned{0, 0};
  if (online) {
    drop_overwritten(shape, count, next, planned);
    while (planned.online < batch) {
      const std::int64_t env = longest_waiting(shape, count, next);
      if (env < 0) break;
      ids[2 * planned.online] = env;
      ids[2 * planned.online + 1] = next[env] + 1;
      next[env] += shape.rows + 1;
      ++planned.online;
    }
  }
  const std::int64_t total = window_count(shape, count);
  if (total == 0) return planned;
  for (std::int64_t b = planned.online; b < batch; ++b) {
    std::int64_t pick = draw_below(draws, total);
    std::int64_t env = 0;
    for (;; ++env) {
      const std::int64_t here = windows_of(shape, count[env]);
      if (pick < here) break;
      pick -= here;
    }
    ids[2 * b] = env;
    ids[2 * b + 1] = oldest_row(shape, count[env]) + pick + 1;
  }
  return planned;
}

void gather(const Shape& shape, const Key& key, std::int64_t batch, const std::int64_t* ids,
            std::uint8_t* out) {
  const std::int64_t bytes = key.rows * key.record;
  for (std::int64_t b = 0; b < batch; ++b, out += bytes) {
    const std::int64_t slot = (ids[2 * b + 1] - 1 + key.first) % shape.length;
    const std::int64_t head = std::min(key.rows, shape.length - slot) * key.record;
    const std::uint8_t* env = key.ring + ids[2 * b] * shape.length * key.record;
    std::memcpy(out, env + slot * key.record, head);
    if (head < bytes) std::memcpy(out + head, env, bytes - head);
  }
}

void repair_last(const Shape& shape, std::int64_t batch, const std::uint8_t* first,
                 std::uint8_t* last) {
  for (std::int64_t b = 0; b < batch; ++b, first += shape.rows, last += shape.rows)
    for (std::int64_t t = 0; t + 1 < shape.rows; ++t) last[t] |= first[t + 1];
}

void append(const Shape& shape, const std::vector<Key>& keys, std::int64_t* count,
            const std::int64_t* envs, std::int64_t m, const std::uint8_t* const* rows) {
  for (std::int64_t i = 0; i < m; ++i) {
    const std::int64_t slot = envs[i] * shape.length + count[envs[i]]++ % shape.length;
    for (std::size_t k = 0; k < keys.size(); ++k) {
      const std::int64_t record = keys[k].record;
      copy_record(keys[k].ring + slot * record, rows[k] + i * record, record);
    }
  }
}

std::int64_t write_back(const Shape& shape, const Key& key, const std::int64_t* count,
                        std::int64_t batch, const std::int64_t* ids, const std::uint8_t* values) {
  std::int64_t dropped = 0;
  for (std::int64_t b = 0; b < batch; ++b, values += shape.rows * key.record) {
    const std::int64_t env = ids[2 * b];
    const std::int64_t row = ids[2 * b + 1];
    const std::int64_t skip =
        std::clamp<std::int64_t>(oldest_row(shape, count[env]) - row, 0, shape.rows);
    dropped += skip;
    std::uint8_t* ring = key.ring + env * shape.length * key.record;
    const std::int64_t rows = shape.rows - skip;
    const std::int64_t slot = (row + skip) % shape.length;
    const std::int64_t head = std::min(rows, shape.length - slot);
    const std::uint8_t* from = values + skip * key.record;
    std::memcpy(ring + slot * key.record, from, head * key.record);
    std::memcpy(ring, from + head * key.record, (rows - head) * key.record);
  }
  return dropped;
}

}  // namespace fastwm::replay
