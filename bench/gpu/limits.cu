// The limits of a card without torch: gaps between kernels, barriers, sums across blocks, reading.
// Prints lines `what,value,unit`, which are medians over replays of a CUDA graph. limits.py compiles and runs it.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda/atomic>
#include <functional>
#include <vector>

namespace cg = cooperative_groups;

constexpr int kThreads = 512;  // of a block, as in csrc/cuda
constexpr int kNodes = 200;    // kernels of a graph
constexpr int kTimes = 200;    // barriers of a kernel
constexpr int kReplays = 21;
constexpr int kCluster = 8;                    // blocks
constexpr size_t kBytes = size_t(1) << 31;     // far more than the second-level cache
constexpr size_t kWeights = size_t(48) << 20;  // about what a masked linear of a 7B model reads

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA says: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void empty_kernel() {}

// Lets the next kernel start at once, and waits for the one before.
__global__ void overlapping_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

__global__ void grid_sync_kernel(int times) {
  for (int i = 0; i < times; i++) cg::this_grid().sync();
}

// The barrier of the Triton kernels. state: blocks that have arrived, and barriers that have opened.
__global__ void atomic_barrier_kernel(unsigned* state, int times) {
  const cuda::atomic_ref<unsigned, cuda::thread_scope_device> arrived(state[0]), opened(state[1]);
  for (int i = 0; i < times; i++) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned before = opened.load(cuda::memory_order_acquire);
      if (arrived.fetch_add(1, cuda::memory_order_acq_rel) == gridDim.x - 1) {
        arrived.store(0, cuda::memory_order_relaxed);
        opened.fetch_add(1, cuda::memory_order_release);
      } else {
        while (opened.load(cuda::memory_order_acquire) == before) {
        }
      }
    }
    __syncthreads();
  }
}

// Every block of a cluster adds up one number a thread over all of them.
__global__ void cluster_sum_kernel(float* sums, int times) {
#if __CUDA_ARCH__ >= 900
  __shared__ float mine[kThreads];
  const auto cluster = cg::this_cluster();
  float value = float(threadIdx.x);
  for (int i = 0; i < times; i++) {
    mine[threadIdx.x] = value;
    cluster.sync();
    value = 0;
    for (int b = 0; b < kCluster; b++) value += cluster.map_shared_rank(mine, b)[threadIdx.x];
    value /= kCluster;
    cluster.sync();
  }
  sums[blockIdx.x * kThreads + threadIdx.x] = value;
#endif
}

__global__ void fill_kernel(uint4* data, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const unsigned noise = unsigned(i) * 2654435761u;
    data[i] = {noise, noise, ~noise, ~noise};
  }
}

__device__ unsigned folded(uint4 packet) { return packet.x ^ packet.y ^ packet.z ^ packet.w; }

// kLoads packets of 16 bytes in flight a thread. What was filled folds to 0, but the compiler cannot know.
template <int kLoads>
__global__ void __launch_bounds__(kThreads, 1) read_kernel(const uint4* data, int64_t count, unsigned* never) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  unsigned all = 0;
  for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
    uint4 packets[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; l++) packets[l] = __ldcs(data + i + l * stride);
#pragma unroll
    for (int l = 0; l < kLoads; l++) all |= folded(packets[l]);
  }
  for (; i < count; i += stride) all |= folded(__ldcs(data + i));
  if (all) *never = all;
}

struct Launch {
  int blocks;
  cudaLaunchAttributeID attribute = cudaLaunchAttributeIgnore;
};

template <class... Parameters, class... Arguments>
void launch(cudaStream_t stream, Launch how, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = how.attribute;
  if (how.attribute == cudaLaunchAttributeCooperative) attribute.val.cooperative = 1;
  if (how.attribute == cudaLaunchAttributeProgrammaticStreamSerialization)
    attribute.val.programmaticStreamSerializationAllowed = 1;
  if (how.attribute == cudaLaunchAttributeClusterDimension) attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(how.blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Median microseconds of a replay of what `work` does on a stream.
double replay(cudaStream_t stream, const std::function<void()>& work) {
  work();  // loads the kernels
  check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times(kReplays);
  for (float& milliseconds : times) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&milliseconds, begin, end));
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return 1e3 * times[kReplays / 2];
}

void print(const char* what, double value, const char* unit) {
  std::printf("%s,%.3f,%s\n", what, value, unit);
  std::fflush(stdout);
}

int main() {
  int processors = 0, major = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  uint4* memory;
  unsigned* scratch;
  check(cudaMalloc(&memory, kBytes));
  fill_kernel<<<4 * processors, kThreads, 0, stream>>>(memory, kBytes / sizeof(uint4));
  check(cudaGetLastError());
  check(cudaMalloc(&scratch, 1 << 20));
  check(cudaMemset(scratch, 0, 1 << 20));
  const Launch plain{processors}, together{processors, cudaLaunchAttributeCooperative};

  // what one more kernel of a graph takes, and what it takes without the start of the whole
  const auto gap = [&](const char* what, Launch how, auto kernel) {
    print(what,
          replay(stream,
                 [&] {
                   for (int i = 0; i < kNodes; i++) launch(stream, how, kernel);
                 }) /
              kNodes,
          "us");
  };
  gap("kernel after kernel", plain, empty_kernel);
  gap("cooperative kernel after kernel", together, empty_kernel);
  if (major >= 9)
    gap("kernel after kernel that lets it start early",
        {processors, cudaLaunchAttributeProgrammaticStreamSerialization}, overlapping_kernel);

  // what one more barrier of a kernel takes
  const auto each = [&](const char* what, const std::function<void(int)>& run) {
    print(what, (replay(stream, [&] { run(kTimes); }) - replay(stream, [&] { run(0); })) / kTimes, "us");
  };
  each("barrier of a grid", [&](int times) { launch(stream, together, grid_sync_kernel, times); });
  each("barrier of a grid by atomics",
       [&](int times) { launch(stream, together, atomic_barrier_kernel, scratch, times); });
  const Launch two_each{2 * processors, cudaLaunchAttributeCooperative};
  each("barrier of a grid with two blocks a processor",
       [&](int times) { launch(stream, two_each, grid_sync_kernel, times); });
  if (major >= 9)
    each("sum over a cluster of 8", [&](int times) {
      const Launch clusters{processors / kCluster * kCluster, cudaLaunchAttributeClusterDimension};
      launch(stream, clusters, cluster_sum_kernel, reinterpret_cast<float*>(scratch), times);
    });

  const auto reading = [&](int loads, int blocks, size_t bytes, auto kernel) {
    const int64_t count = int64_t(bytes / sizeof(uint4));
    const double us = replay(stream, [&] {
      for (size_t at = 0; at + bytes <= kBytes; at += bytes)
        launch(stream, {blocks * processors}, kernel, memory + at / sizeof(uint4), count, scratch);
    });
    char what[100];
    std::snprintf(what, sizeof what, "reading %zu MB a kernel with %d loads in flight and %d blocks a processor",
                  bytes >> 20, loads, blocks);
    print(what, double(kBytes / bytes * bytes) / us / 1e3, "GB/s");
  };
  for (const size_t bytes : {kBytes, kWeights})
    for (const int blocks : {1, 2}) {
      reading(4, blocks, bytes, read_kernel<4>);
      reading(8, blocks, bytes, read_kernel<8>);
      reading(16, blocks, bytes, read_kernel<16>);
    }
}
