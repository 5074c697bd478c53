// CUDA kernels on the CPU, for tests: every thread of a block is a fiber of its own, and blocks run
// one after the other. Threads switch only at barriers and warp collectives, in an order that tests
// choose (forward, reverse, random), so a result that depends on who comes first shows. Shared memory
// holds not-a-numbers when a block begins. A barrier that threads reach at different places or not
// at all, and an access outside of the arrays (guard.cpp), end the launch with an error.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#define FWM_EMULATED 1
#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define CUDART_VERSION 13000

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedLimit = 48 << 10;  // what a kernel gets without asking for more
constexpr int kForward = -1, kReverse = -2;  // orders; others: the seed of a random one

enum class State { kReady, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int number = 0;
  bool started = false;
  State state = State::kDone;
  std::source_location at;  // where it waits
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
  int order = 1;
  std::mt19937 random{1};
  std::set<void*> arrays;  // of shared memory, that this block has used
  size_t shared_bytes = 0;
  std::string error;       // of the last launch
  int launches = 0;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline std::string place(const Fiber& f) {
  return "thread " + std::to_string(f.number) + " of block " + std::to_string(machine().at.x);
}

[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  m.error = m.current == nullptr ? what : what + " in " + place(*m.current);
  _longjmp(m.scheduler, 2);
}

inline void wait(State state, const std::source_location& at) {
  Fiber& self = *machine().current;
  self.state = state;
  self.at = at;
  if (_setjmp(self.resume) == 0) _longjmp(machine().scheduler, 1);
}

// Called where a kernel declares an array in shared memory.
inline void declare_shared(void* data, size_t bytes) {
  Machine& m = machine();
  if (!m.arrays.insert(data).second) return;
  memset(data, 0xff, bytes);
  if ((m.shared_bytes += bytes) > kSharedLimit) fail("more than 48 kB of shared memory");
}

inline void body() {
  machine().kernel();
  machine().current->state = State::kDone;
  _longjmp(machine().scheduler, 1);
}

// False: the launch has failed.
inline bool run(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  const int back = _setjmp(m.scheduler);
  if (back == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    setcontext(&fiber.context);
  }
  return back == 1;
}

// Frees the threads [begin, end) if all wait for the same thing at the same place.
inline bool release(unsigned begin, unsigned end, State state) {
  Machine& m = machine();
  const std::source_location& at = m.fibers[begin]->at;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& f = *m.fibers[i];
    if (f.state != state || f.at.line() != at.line() || f.at.column() != at.column()) return false;
  }
  for (unsigned i = begin; i < end; ++i) m.fibers[i]->state = State::kReady;
  return true;
}

inline void arrange(std::vector<unsigned>& order) {
  Machine& m = machine();
  for (unsigned i = 0; i < order.size(); ++i) {
    order[i] = m.order == kReverse ? (unsigned)order.size() - 1 - i : i;
  }
  if (m.order >= 0) std::shuffle(order.begin(), order.end(), m.random);
}

inline bool stuck() {
  Machine& m = machine();
  m.error = "a barrier or warp collective that not all threads reach:";
  for (unsigned i = 0; i < m.count; ++i) {
    const Fiber& f = *m.fibers[i];
    if (i > 0 && f.state == m.fibers[i - 1]->state && f.at.line() == m.fibers[i - 1]->at.line()) {
      continue;
    }
    m.error += f.state == State::kDone ? " " + place(f) + " has returned;"
                                       : " " + place(f) + " waits in " + f.at.function_name() +
                                             " line " + std::to_string(f.at.line()) + ";";
  }
  return false;
}

// Runs the threads [begin, end) of a warp until all wait for the block or have returned.
inline bool run_warp(unsigned begin, unsigned end, bool& ran) {
  Machine& m = machine();
  std::vector<unsigned> order(end - begin);
  for (bool freed = true; freed; freed = release(begin, end, State::kWarp)) {
    arrange(order);
    for (unsigned i : order) {
      if (m.fibers[begin + i]->state != State::kReady) continue;
      if (!run(*m.fibers[begin + i])) return false;
      ran = true;
    }
  }
  return true;
}

// Warps one after the other, each as far as it gets: where a barrier is missing, one of them is
// ahead of what the others still read or have yet to write.
inline bool run_block() {
  Machine& m = machine();
  std::vector<unsigned> order((m.count + kWarp - 1) / kWarp);
  for (;;) {
    bool ran = false, alive = false;
    arrange(order);
    for (unsigned warp : order) {
      const unsigned end = (warp + 1) * kWarp;
      if (!run_warp(warp * kWarp, end < m.count ? end : m.count, ran)) return false;
    }
    for (unsigned i = 0; i < m.count; ++i) alive |= m.fibers[i]->state != State::kDone;
    if (!alive) return true;
    if (!release(0, m.count, State::kBlock) && !ran) return stuck();
  }
}

inline void on_fault(int) { fail("an access outside of the arrays"); }

inline void run_grid(size_t shared) {
  Machine& m = machine();
  const dim3 block = m.block;
  std::vector<unsigned> blocks(m.grid.x * m.grid.y * m.grid.z);
  arrange(blocks);
  for (const unsigned at : blocks) {
    m.at = dim3(at % m.grid.x, at / m.grid.x % m.grid.y, at / (m.grid.x * m.grid.y));
    if (shared > 0) memset(m.shared.data(), 0xff, shared);
    m.arrays.clear();
    m.shared_bytes = shared;
    for (unsigned i = 0; i < m.count; ++i) {
      Fiber& f = *m.fibers[i];
      f.number = (int)i, f.started = false, f.state = State::kReady;
      f.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    }
    if (!run_block()) return;
  }
}

// What `kernel<<<grid, block, shared, stream>>>(...)` becomes.
inline void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   std::function<void()> kernel) {
  Machine& m = machine();
  if (!m.error.empty()) return;  // as on a GPU, until someone asks for the error
  m.grid = grid, m.block = block, m.kernel = std::move(kernel), ++m.launches;
  m.count = block.x * block.y * block.z;
  if (grid.x * grid.y * grid.z == 0 || m.count == 0 || m.count > 1024 || shared > kSharedLimit) {
    m.error = "a bad launch";
    return;
  }
  while (m.fibers.size() < m.count) m.fibers.push_back(std::make_unique<Fiber>());
  m.slots.resize(m.count);
  m.shared.resize(shared);
  struct sigaction action = {}, before;
  action.sa_handler = on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  run_grid(shared);
  sigaction(SIGSEGV, &before, nullptr);
  m.current = nullptr;
  m.kernel = nullptr;
}

inline std::string take_error() { return std::exchange(machine().error, std::string()); }

// The value that `lane` of this warp brought.
template <class T>
T exchange(T value, unsigned lane, unsigned lanes, const std::source_location& at) {
  static_assert(sizeof(T) <= 8);
  if (lanes != ~0u) fail("a warp collective of some lanes, which is not emulated");
  Machine& m = machine();
  const unsigned self = (unsigned)m.current->number, warp = self / kWarp * kWarp;
  if (warp + kWarp > m.count) fail("a warp collective in a warp that is not full");
  memcpy(&m.slots[self], &value, sizeof(T));
  wait(State::kWarp, at);
  T out;
  memcpy(&out, &m.slots[warp + lane], sizeof(T));
  wait(State::kWarp, at);  // before anyone brings the next one
  return out;
}

inline unsigned lane() { return (unsigned)machine().current->number % kWarp; }

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return emulation::machine().error.empty() ? cudaSuccess : 1; }

#define threadIdx (::emulation::machine().current->thread)
#define blockIdx (::emulation::machine().at)
#define blockDim (::emulation::machine().block)
#define gridDim (::emulation::machine().grid)

#define FWM_HERE const std::source_location& at = std::source_location::current()

inline void __syncthreads(FWM_HERE) { ::emulation::wait(::emulation::State::kBlock, at); }

inline void __syncwarp(unsigned lanes = ~0u, FWM_HERE) {
  if (lanes != ~0u) ::emulation::fail("a warp barrier of some lanes, which is not emulated");
  ::emulation::wait(::emulation::State::kWarp, at);
}

// Lanes [from, from + width) exchange among themselves.
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32, FWM_HERE) {
  const unsigned lane = ::emulation::lane(), source = lane ^ (unsigned)mask;
  const bool near = source / width == lane / width;
  return ::emulation::exchange(value, near ? source : lane, lanes, at);
}
template <class T>
T __shfl_sync(unsigned lanes, T value, int from, int width = 32, FWM_HERE) {
  const unsigned start = ::emulation::lane() / width * width;
  return ::emulation::exchange(value, start + (unsigned)from % width, lanes, at);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, unsigned by, int width = 32, FWM_HERE) {
  const unsigned lane = ::emulation::lane();
  return ::emulation::exchange(value, lane % width < by ? lane : lane - by, lanes, at);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned by, int width = 32, FWM_HERE) {
  const unsigned lane = ::emulation::lane();
  return ::emulation::exchange(value, lane % width + by < (unsigned)width ? lane + by : lane, lanes, at);
}
