// Planning and copying of replay windows. No Python, no torch: pointers and sizes.
//
// A ring holds `length` records per env and key, laid out [env][time]; row n of an env lies in slot
// n % length. count[env] is the number of rows ever written, so rows count - length .. count - 1
// are alive. Nothing here allocates or locks; bound: memcpy bandwidth of the gathered runs.
#pragma once

#include <cstdint>
#include <vector>

namespace fastwm::replay {

struct Shape {
  std::int64_t envs;    // N
  std::int64_t length;  // L, rows per env
  std::int64_t rows;    // T; a window is T + 1 rows
};

struct Key {
  std::uint8_t* ring;   // (N, L, record)
  std::int64_t record;  // bytes per row
  std::int64_t first;   // first row of a window that this key hands out
  std::int64_t rows;    // how many of them
};

struct Draws {
  std::uint64_t key;   // of the generator
  std::uint64_t done;  // draws so far; word i is a hash of key and i
};

struct Planned {
  std::int64_t online;   // windows of the batch that came from the online queue
  std::int64_t dropped;  // online windows that were overwritten before anybody asked for them
};

// Number of windows that a uniform draw chooses from.
std::int64_t window_count(const Shape& shape, const std::int64_t* count);

// Writes ids (B, 2) = (env, row 1 of the window). Waiting online windows first, the longest waiting
// first (next[env] = first row of the next one, advanced here), then uniform over all windows.
// With no window alive and none waiting nothing more is written: the caller checks before.
Planned plan(const Shape& shape, const std::int64_t* count, std::int64_t* next, Draws& draws,
             std::int64_t batch, bool online, std::int64_t* ids);

// out (B, key.rows, record) = rows of the windows; overwrites, out must not overlap the ring.
void gather(const Shape& shape, const Key& key, std::int64_t batch, const std::int64_t* ids,
            std::uint8_t* out);

// last[b, t] |= first[b, t + 1], bytes 0 or 1 (B, T): an abandoned episode ends before the next.
void repair_last(const Shape& shape, std::int64_t batch, const std::uint8_t* first,
                 std::uint8_t* last);

// One new row of every key for each of the m envs: rows[k] (m, keys[k].record); advances count.
// Env by env, so that the slot is worked out once; of the rows only the written bytes are touched.
void append(const Shape& shape, const std::vector<Key>& keys, std::int64_t* count,
            const std::int64_t* envs, std::int64_t m, const std::uint8_t* const* rows);

// Writes values (B, T, record) over rows 1..T of the windows, in batch order, except where the row
// was overwritten meanwhile; returns how many rows were left alone.
std::int64_t write_back(const Shape& shape, const Key& key, const std::int64_t* count,
                        std::int64_t batch, const std::int64_t* ids, const std::uint8_t* values);

}  // namespace fastwm::replay
