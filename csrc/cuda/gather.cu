// A block per 16 kB of a window of one ring: threads copy 16 bytes each where rows allow it, which
// is the case for images and latents, else 4 or 1. Bound by memory.
#include "cuda/gather.h"

#include "bf16.h"
#include "cuda/launch.cuh"

namespace fastwm::cuda {
namespace {

struct alignas(16) Wide {
  uint32_t word[4];
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T item[4];
};

// Where a block works: bytes [begin, end) of window b of a ring.
struct Piece {
  const uint8_t* env;  // the ring of the window's env
  int64_t start;       // the window's first byte there
  int64_t wrap;        // bytes of the env's ring
  int64_t out;         // the window's first byte, counted as in the ring
  int64_t begin, end;

  __device__ Piece(const GatherFrom& from, const GatherEntry& e) {
    const int64_t block = blockIdx.x - e.first_block, b = block / e.pieces;
    const int64_t last = from.envs - 1, env = from.ids[2 * b];
    const int64_t window = e.ring.rows * e.ring.record;
    wrap = from.length * e.ring.record;
    this->env = e.ring.ring + (env < 0 ? 0 : env > last ? last : env) * wrap;
    start = gather_slot(from, e.ring, from.ids[2 * b + 1]) * e.ring.record;
    out = b * window;
    begin = block % e.pieces * kPiece;
    end = begin + kPiece < window ? begin + kPiece : window;
  }
  __device__ const uint8_t* source(int64_t i) const {
    const int64_t at = start + i;
    return env + (at < wrap ? at : at - wrap);
  }
};

template <class Unit>
__device__ void copy(const Piece& p, uint8_t* out) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * sizeof(Unit);
  for (int64_t i = p.begin + threadIdx.x * static_cast<int64_t>(sizeof(Unit)); i < p.end; i += step) {
    *reinterpret_cast<Unit*>(out + p.out + i) = *reinterpret_cast<const Unit*>(p.source(i));
  }
}

template <class T>
__device__ void scale(const Piece& p, T* out, int unit) {
  if (unit >= 4) {
    const int64_t step = static_cast<int64_t>(blockDim.x) * 4;
    for (int64_t i = p.begin + threadIdx.x * 4; i < p.end; i += step) {
      const Four<uint8_t> bytes = *reinterpret_cast<const Four<uint8_t>*>(p.source(i));
      Four<T> four;
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(unit_byte(bytes.item[k]), four.item[k]);
      *reinterpret_cast<Four<T>*>(out + p.out + i) = four;
    }
  } else {
    for (int64_t i = p.begin + threadIdx.x; i < p.end; i += blockDim.x) {
      narrow(unit_byte(*p.source(i)), out[p.out + i]);
    }
  }
}

__global__ void gather_kernel(const __grid_constant__ GatherTable table) {
  int k = table.rings - 1;
  while (k > 0 && table.entry[k].first_block > blockIdx.x) --k;
  const GatherEntry& e = table.entry[k];
  const Piece piece(table.from, e);
  if (e.ring.kind == 1) {
    scale(piece, reinterpret_cast<float*>(e.ring.out), e.unit);
  } else if (e.ring.kind == 2) {
    scale(piece, reinterpret_cast<Bf16*>(e.ring.out), e.unit);
  } else if (e.unit == 16) {
    copy<Wide>(piece, e.ring.out);
  } else if (e.unit == 4) {
    copy<uint32_t>(piece, e.ring.out);
  } else {
    copy<uint8_t>(piece, e.ring.out);
  }
}

}  // namespace

bool add_ring(GatherTable& table, const GatherRing& ring) {
  const int64_t window = ring.rows * ring.record;
  if (window > 0) {
    GatherEntry& e = table.entry[table.rings++];
    e.ring = ring;
    e.first_block = table.blocks;
    e.pieces = static_cast<int32_t>((window + kPiece - 1) / kPiece);
    const auto places = reinterpret_cast<uintptr_t>(ring.ring) | static_cast<uintptr_t>(ring.record);
    const uintptr_t all = places | (ring.kind == 0 ? reinterpret_cast<uintptr_t>(ring.out) : 0);
    e.unit = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
    table.blocks += e.pieces * table.from.batch;
  }
  return table.rings < kTableRings;
}

cudaError_t gather_windows(const GatherTable& table, cudaStream_t stream) {
  if (table.blocks == 0) return cudaSuccess;
  gather_kernel<<<blocks_for(table.blocks, 1), kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

}  // namespace fastwm::cuda
