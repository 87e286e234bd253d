// A stand-in for CUDA that runs kernels on the CPU, for tests: every thread is a fiber, and a scheduler that
// means no good decides which one runs. Covers what csrc/cuda uses, in CUDA's own names.
//
// A fiber runs until it has to wait: at a barrier of its warp, its block or the grid. RANA_SHIM_SCHEDULE picks
// who is next: the first thread that can run ("forward"), the last ("reverse"), any thread of a block that comes
// before the others ("random:<seed>"), or any at all ("mixed:<seed>"). Threads thus run as far ahead of the
// others as the kernel lets them. RANA_SHIM_PROCESSORS: multiprocessors of the current device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace shim {

enum class Scope { warp, block, grid };

// Waits until all threads of the warp, block or grid are here. Each leaves a value, and may then look at those
// of the others until it waits again. `what` names the call: all must make the same one.
void wait(Scope scope, const char* what, uint64_t value = 0);
uint64_t left_by(Scope scope, int thread);
extern size_t most_shared;  // bytes that a launch may ask for
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void require(bool condition, const char* message);

template <class V>
V exchange(V value, int source_lane, const char* what) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  wait(Scope::warp, what, bits);
  bits = left_by(Scope::warp, source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The operands of a lane in a product of matrices. Lane 4 g + t has of rows g and g + 8 of a, and of column g of b,
// number 2 t of the products and the next, then these plus 8.
struct Operands {
  float a[4][2], b[2][2];
};

// Adds the products of the lanes of a warp. Lane 4 g + t has rows g and g + 8 of c at columns 2 t and the next.
void multiply_add(float (&c)[4], const Operands& mine);

// The same for operands of 16 bits, two in a word.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Operands mine;
  const auto widen = [](uint32_t word, float (&values)[2]) {
    T both[2];
    std::memcpy(both, &word, sizeof word);
    values[0] = float(both[0]), values[1] = float(both[1]);
  };
  for (int i = 0; i < 4; i++) widen(a[i], mine.a[i]);
  for (int i = 0; i < 2; i++) widen(b[i], mine.b[i]);
  multiply_add(c, mine);
}

// a + b for two values of 16 bits in a word.
template <class T>
uint32_t add_pairs(uint32_t a, uint32_t b) {
  T of_a[2], of_b[2];
  std::memcpy(of_a, &a, sizeof a);
  std::memcpy(of_b, &b, sizeof b);
  const T sums[2] = {T(float(of_a[0]) + float(of_b[0])), T(float(of_a[1]) + float(of_b[1]))};
  std::memcpy(&a, sums, sizeof a);
  return a;
}

// Four matrices of 8 x 8 values of 16 bits: lane 8 i + r gives row r of matrix i. Lane 4 g + t gets of each matrix
// column g of the rows 2 t and the next.
inline void load_transposed(uint32_t (&words)[4], const void* row) {
  require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a row of a matrix is not aligned");
  wait(Scope::warp, "ldmatrix", reinterpret_cast<uint64_t>(row));
  const int group = int(threadIdx.x % 32) / 4, member = int(threadIdx.x % 4);
  const auto value = [&](int lane) {
    return uint32_t(reinterpret_cast<const uint16_t*>(left_by(Scope::warp, lane))[group]);
  };
  for (int i = 0; i < 4; i++) words[i] = value(8 * i + 2 * member) | value(8 * i + 2 * member + 1) << 16;
  wait(Scope::warp, "the end of ldmatrix");
}

template <class V>
V load(const V* p) {
  require(reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0, "a load is not aligned");
  return *p;
}

}  // namespace shim

// ---- device ----

using std::min;
inline void __syncthreads() { shim::wait(shim::Scope::block, "__syncthreads"); }
inline void __syncwarp() { shim::wait(shim::Scope::warp, "__syncwarp"); }

template <class V>
V __shfl_sync(unsigned, V value, int source) {
  return shim::exchange(value, source, "__shfl_sync");
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return shim::exchange(value, int(threadIdx.x % 32) ^ mask, "__shfl_xor_sync");
}
template <class V>
V __shfl_up_sync(unsigned, V value, int delta) {
  const int lane = int(threadIdx.x % 32);
  return shim::exchange(value, lane < delta ? lane : lane - delta, "__shfl_up_sync");
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  shim::wait(shim::Scope::warp, "__reduce_or_sync", value);
  unsigned all = 0;
  for (int lane = 0; lane < 32; lane++) all |= unsigned(shim::left_by(shim::Scope::warp, lane));
  return all;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return bytes;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class V>
V __ldg(const V* p) {
  return shim::load(p);
}
template <class V>
V __ldcs(const V* p) {
  return shim::load(p);
}
template <class V>
V __ldcg(const V* p) {
  return shim::load(p);
}

// ---- host ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaGetDevice(int* device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the shim"; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
// For all kernels at once, where CUDA has it for each; and no more than the card with the least can give.
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  shim::most_shared = std::max(shim::most_shared, size_t(bytes));
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorUnknown;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  *blocks = threads <= 1024 && shared_bytes <= shim::most_shared;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  shim::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
