"""What the emulation of tests/emulate.py finds in kernels that are wrong."""

import ctypes
import shutil

import emulate
import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++)")

KERNELS = r"""
#include <cuda_runtime.h>
#define WARP 0xffffffffu

__global__ void sum(const float* x, float* out, int barriers) {
  __shared__ float all[64];
  all[threadIdx.x] = x[threadIdx.x];
  if (barriers) __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < 64; ++i) total += all[i];
  out[threadIdx.x] = total;
}
__global__ void unset(float* out) {
  __shared__ float all[64];
  if (blockIdx.x == 0) all[threadIdx.x] = 1.0f;
  out[threadIdx.x] = all[threadIdx.x];
}
__global__ void leave() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}
__global__ void two_places() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void some_lanes(float* out) { out[0] = __shfl_xor_sync(0xffu, 1.0f, 1); }
__global__ void half_warps(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(WARP, 1.0f, 1);
}
__global__ void lanes(float* out, int kind) {
  const float x = threadIdx.x;
  float y = __shfl_xor_sync(WARP, x, 3);
  if (kind == 1) y = __shfl_sync(WARP, x, 2, 8);
  if (kind == 2) y = __shfl_up_sync(WARP, x, 3);
  if (kind == 3) y = __shfl_down_sync(WARP, x, 3, 8);
  out[threadIdx.x] = y;
}
__global__ void twice(float* out, int barriers) {
  __shared__ float part[2];
  for (int i = 1; i <= 2; ++i) {
    const float x = __shfl_xor_sync(WARP, (float)i, 1);
    if (barriers) __syncthreads();  // whoever still reads the last ones
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    out[threadIdx.x] += part[0] + part[1];
  }
}
__global__ void store(float* out, int at) { out[at] = 1.0f; }

extern "C" __attribute__((visibility("default"))) const char* run(int kind, float* x, float* out,
                                                                  int argument, int order) {
  emulation::machine().order = order;
  emulation::machine().random.seed(order);
  if (kind == 0) sum<<<1, 64, 0, nullptr>>>(x, out, argument);
  if (kind == 1) unset<<<argument, 64, 0, nullptr>>>(out);
  if (kind == 2) leave<<<1, 64, 0, nullptr>>>();
  if (kind == 3) two_places<<<1, 64, 0, nullptr>>>();
  if (kind == 4) some_lanes<<<1, 32, 0, nullptr>>>(out);
  if (kind == 5) half_warps<<<1, 32, 0, nullptr>>>(out);
  if (kind == 6) lanes<<<1, 32, 0, nullptr>>>(out, argument);
  if (kind == 7) store<<<1, 1, 0, nullptr>>>(out, argument);
  if (kind == 8) twice<<<1, 64, 0, nullptr>>>(out, argument);
  static std::string error;
  error = emulation::take_error();
  return error.c_str();
}
"""
SUM, UNSET, LEAVE, TWO_PLACES, SOME_LANES, HALF_WARPS, LANES, STORE, TWICE = range(9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(emulate.translate(KERNELS))
    emulate.compile_library([source], library, [emulate.HEADERS])
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]

    def call(kind, out=None, argument=0, order=1, x=None):
        pointers = [None if t is None else t.data_ptr() for t in (x, out)]
        return function(kind, *pointers, argument, order).decode()

    return call


@pytest.mark.parametrize("order", [-1, -2, 1])
def test_missing_barrier(run, order):
    x, out = torch.ones(64), torch.zeros(64)
    assert run(SUM, out, 1, order, x) == "" and torch.equal(out, torch.full((64,), 64.0))
    assert run(SUM, out, 0, order, x) == "" and out.isnan().any()


@pytest.mark.parametrize("order", [-1, -2, 1])
def test_missing_barrier_between_two_uses(run, order):
    for barriers in (1, 0):
        out = torch.zeros(64)
        assert run(TWICE, out, barriers, order) == ""
        assert torch.equal(out, torch.full((64,), 6.0)) == bool(barriers)


def test_shared_memory_of_a_block_before_is_not_seen(run):
    out = torch.zeros(64)
    assert run(UNSET, out, 1, -1) == "" and torch.equal(out, torch.ones(64))
    assert run(UNSET, out, 2, -1) == "" and out.isnan().all()  # the second block sets nothing


def test_barriers_that_not_all_threads_reach(run):
    assert "thread 7 of block 0 has returned" in run(LEAVE)
    error = run(TWO_PLACES)
    assert "thread 0 of block 0 waits in" in error and "thread 32" in error
    out = torch.zeros(32)
    assert "some lanes" in run(SOME_LANES, out)
    assert "thread 16 of block 0 has returned" in run(HALF_WARPS, out)


def test_exchange_between_lanes(run):
    lane, out = torch.arange(32), torch.zeros(32)
    expected = [lane ^ 3, lane // 8 * 8 + 2, torch.where(lane < 3, lane, lane - 3),
                torch.where(lane % 8 + 3 < 8, lane + 3, lane)]  # fmt: skip
    for kind, want in enumerate(expected):
        assert run(LANES, out, kind) == ""
        assert torch.equal(out, want.float()), kind


def test_access_outside_of_a_tensor(run):
    switch = emulate.switches()
    switch.emulation_guard(1)
    out = torch.zeros(5)  # three floats of room before the page that may not be touched
    switch.emulation_guard(0)
    assert run(STORE, out, 4) == "" and out[4] == 1
    assert "outside of the arrays" in run(STORE, out, 8)
    assert run(STORE, out, 5) == ""
    del out
    assert switch.emulation_guard(0) == 1, "the bytes behind the tensor have changed"
    assert switch.emulation_guard(0) == 0
