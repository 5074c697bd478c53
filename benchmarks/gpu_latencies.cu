// Four latencies that decide how a recurrent kernel is built, each as the median of repeated runs:
//   grid barrier     one block per multiprocessor, all wait for all
//   cluster barrier  8 blocks of a cluster                      (compute capability 9.0 and later)
//   remote shared    a dependent load from another block's shared memory in the cluster   (the same)
//   graph node       a dependent kernel without work in a graph
// nvcc -O3 -std=c++20 -arch=native -rdc=true benchmarks/gpu_latencies.cu -o gpu_latencies
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cg = cooperative_groups;

constexpr int kRounds = 1000, kRepeats = 21, kCluster = 8;

#define CHECK(call)                                                             \
  do {                                                                          \
    const cudaError_t error = (call);                                           \
    if (error != cudaSuccess) {                                                 \
      std::printf("%s: %s\n", #call, cudaGetErrorString(error));                \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

__global__ void grid_barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) cg::this_grid().sync();
}

__global__ void cluster_barriers(int rounds) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < rounds; ++i) cg::this_cluster().sync();
#endif
}

// Every load says where the next one is; all entries say "the same place" at the neighbour.
__global__ void remote_loads(int rounds, int* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ int next[32];
  const auto cluster = cg::this_cluster();
  next[threadIdx.x] = static_cast<int>(threadIdx.x);
  cluster.sync();
  const int* there = cluster.map_shared_rank(next, (cluster.block_rank() + 1) % kCluster);
  int at = static_cast<int>(threadIdx.x);
  for (int i = 0; i < rounds; ++i) at = static_cast<const volatile int*>(there)[at];
  out[blockIdx.x * blockDim.x + threadIdx.x] = at;
  cluster.sync();  // nobody leaves while a neighbour reads
#endif
}

__global__ void nothing() {}

// Median milliseconds of run(), which enqueues on `stream`.
template <class F>
float median(cudaStream_t stream, const F& run) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times(kRepeats);
  run();
  for (float& time : times) {
    CHECK(cudaEventRecord(start, stream));
    run();
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&time, start, stop));
  }
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2];
}

void say(const char* name, float with, float without) {
  std::printf("%-16s %8.3f us\n", name, (with - without) * 1e3f / kRounds);
}

template <class F>
void launch_cluster(cudaStream_t stream, const F& kernel, int rounds, int* out) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {kCluster, 1, 1};
  config.blockDim = {32, 1, 1};
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if constexpr (std::is_same_v<F, void (*)(int)>) {
    CHECK(cudaLaunchKernelEx(&config, kernel, rounds));
  } else {
    CHECK(cudaLaunchKernelEx(&config, kernel, rounds, out));
  }
}

void graph_nodes(cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t runnable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kRounds; ++i) nothing<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&runnable, graph, 0));
  say("graph node", median(stream, [&] { CHECK(cudaGraphLaunch(runnable, stream)); }), 0.0f);
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors, capability %d.%d\n", device.name,
              device.multiProcessorCount, device.major, device.minor);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const auto grid = [&](int rounds) {
    return median(stream, [&] {
      void* arguments[] = {&rounds};
      CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers),
                                        device.multiProcessorCount, 256, arguments, 0, stream));
    });
  };
  say("grid barrier", grid(kRounds), grid(0));
  if (device.major >= 9) {
    int* out;
    CHECK(cudaMalloc(&out, kCluster * 32 * sizeof(int)));
    void (*barriers)(int) = cluster_barriers;
    void (*loads)(int, int*) = remote_loads;
    const auto cluster = [&](auto kernel, int rounds) {
      return median(stream, [&] { launch_cluster(stream, kernel, rounds, out); });
    };
    say("cluster barrier", cluster(barriers, kRounds), cluster(barriers, 0));
    say("remote shared", cluster(loads, kRounds), cluster(loads, 0));
  }
  graph_nodes(stream);
  CHECK(cudaStreamSynchronize(stream));
  return 0;
}
