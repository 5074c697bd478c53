// A few threads that walk through the same phases together, cheaply enough for phases of
// microseconds. All workers run the same code; `run` deals the items of one phase out and returns
// when all are done. Each worker starts with its own share (its caches hold the same weights in
// every step) and then takes from the others.
//
// No worker ever waits for one that has not begun: whoever arrives late finds the items taken. So
// this is right with any number of threads actually running, also when the pool runs the workers
// one after another. What an item computes may not depend on who runs it.
#pragma once

#include <stdint.h>

#include <atomic>
#include <memory>
#include <thread>

namespace fastwm {

class Team {
 public:
  Team(int size, int64_t phases)
      : size_(size), slots_(size > 1 ? new Slot[phases * (size + 1)]() : nullptr) {}

  int size() const { return size_; }

 private:
  friend class Worker;
  struct alignas(64) Slot {
    std::atomic<int64_t> value{0};
  };
  int size_;
  std::unique_ptr<Slot[]> slots_;
};

class Worker {
 public:
  Worker(Team& team, int id) : team_(team), id_(id) {}

  int size() const { return team_.size_; }
  int id() const { return id_; }

  template <class F>
  inline __attribute__((always_inline)) void run(int64_t count, const F& item) {
    const int size = team_.size_;
    if (size == 1) {
      for (int64_t i = 0; i < count; ++i) item(i);
      return;
    }
    Team::Slot* slots = team_.slots_.get() + phase_++ * (size + 1);
    int64_t finished = 0;
    for (int other = 0; other < size; ++other) {
      const int owner = (id_ + other) % size;
      const int64_t begin = owner * count / size, end = (owner + 1) * count / size;
      while (true) {
        const int64_t i = begin + slots[owner].value.fetch_add(1, std::memory_order_relaxed);
        if (i >= end) break;
        item(i);
        ++finished;
      }
    }
    std::atomic<int64_t>& done = slots[size].value;
    if (finished != 0) done.fetch_add(finished, std::memory_order_acq_rel);
    for (int64_t spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins > 4096) std::this_thread::yield();
    }
  }

 private:
  Team& team_;
  int id_;
  int64_t phase_ = 0;
};

}  // namespace fastwm
