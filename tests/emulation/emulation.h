// CUDA kernels on the CPU, for tests: every thread of a block is a fiber of its own, and blocks run
// one after the other. Threads switch only at barriers and warp collectives, in a random order, so a
// result that depends on who comes first shows. Exited threads that a barrier waits for, and barriers
// that differ within a block, end the process with a message.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FWM_EMULATED 1
#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum class State { kReady, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int number = 0;
  bool started = false;
  State state = State::kDone;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> kernel;
  std::vector<unsigned char> shared;  // dynamic shared memory of the block
  std::vector<uint64_t> slots;        // one per thread: values under way between lanes
  Fiber* current = nullptr;
  ucontext_t entry;
  jmp_buf scheduler;
  dim3 grid, block, at;
  unsigned count = 0;
  std::mt19937 random{1};
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s in thread %d\n", what,
          machine().current ? machine().current->number : -1);
  abort();
}

inline void wait(State state) {
  Fiber& self = *machine().current;
  self.state = state;
  if (_setjmp(self.resume) == 0) _longjmp(machine().scheduler, 1);
}

inline void body() {
  machine().kernel();
  machine().current->state = State::kDone;
  _longjmp(machine().scheduler, 1);
}

inline void run(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  if (_setjmp(m.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    setcontext(&fiber.context);
  }
}

// Frees the threads [begin, end) if all wait for the same thing.
inline bool release(unsigned begin, unsigned end, State state) {
  Machine& m = machine();
  for (unsigned i = begin; i < end; ++i) {
    if (m.fibers[i]->state != state) return false;
  }
  for (unsigned i = begin; i < end; ++i) m.fibers[i]->state = State::kReady;
  return true;
}

inline void run_block() {
  Machine& m = machine();
  std::vector<unsigned> order(m.count);
  for (unsigned i = 0; i < m.count; ++i) order[i] = i;
  for (;;) {
    bool ran = false, alive = false;
    std::shuffle(order.begin(), order.end(), m.random);
    for (unsigned i : order) {
      if (m.fibers[i]->state != State::kReady) continue;
      run(*m.fibers[i]);
      ran = true;
    }
    for (unsigned i = 0; i < m.count; ++i) alive |= m.fibers[i]->state != State::kDone;
    if (!alive) return;
    bool freed = release(0, m.count, State::kBlock);
    for (unsigned i = 0; i < m.count; i += kWarp) {
      freed |= release(i, i + kWarp < m.count ? i + kWarp : m.count, State::kWarp);
    }
    if (!ran && !freed) fail("a barrier or warp collective that not all threads reach");
  }
}

// What `kernel<<<grid, block, shared, stream>>>(...)` becomes.
inline void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   std::function<void()> kernel) {
  Machine& m = machine();
  m.grid = grid, m.block = block, m.kernel = std::move(kernel);
  m.count = block.x * block.y * block.z;
  if (grid.x * grid.y * grid.z == 0 || m.count == 0 || m.count > 1024) fail("a bad launch");
  while (m.fibers.size() < m.count) m.fibers.push_back(std::make_unique<Fiber>());
  m.slots.resize(m.count);
  m.shared.resize(shared);
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const unsigned at : blocks) {
    m.at = dim3(at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y));
    if (shared > 0) memset(m.shared.data(), 0xff, shared);  // not a number
    for (unsigned i = 0; i < m.count; ++i) {
      Fiber& f = *m.fibers[i];
      f.number = (int)i, f.started = false, f.state = State::kReady;
      f.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    }
    run_block();
  }
  m.current = nullptr;
}

// The value that `lane` of this warp brought.
template <class T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  Machine& m = machine();
  const unsigned self = (unsigned)m.current->number, warp = self / kWarp * kWarp;
  memcpy(&m.slots[self], &value, sizeof(T));
  wait(State::kWarp);
  T out = value;
  if (warp + lane < m.count) memcpy(&out, &m.slots[warp + lane], sizeof(T));
  wait(State::kWarp);  // before anyone brings the next one
  return out;
}

inline unsigned lane() { return (unsigned)machine().current->number % kWarp; }

}  // namespace emulation

#define threadIdx (::emulation::machine().current->thread)
#define blockIdx (::emulation::machine().at)
#define blockDim (::emulation::machine().block)
#define gridDim (::emulation::machine().grid)

inline void __syncthreads() { ::emulation::wait(::emulation::State::kBlock); }
inline void __syncwarp(unsigned = ~0u) { ::emulation::wait(::emulation::State::kWarp); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::emulation::exchange(value, ::emulation::lane() ^ (unsigned)mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return ::emulation::exchange(value, (unsigned)from % ::emulation::kWarp);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = ::emulation::lane();
  return ::emulation::exchange(value, lane < by ? lane : lane - by);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned lane = ::emulation::lane();
  return ::emulation::exchange(value, lane + by < ::emulation::kWarp ? lane + by : lane);
}
