// The basics of the kernels: threads, sums over a warp, shared memory.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <type_traits>

#include "../dtypes.h"

// The shared memory of a block. Each phase of a kernel lays its own structure over it.
extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

constexpr int kLanes = 32;  // of a warp
// The size of a block of the decode kernels. A block has a multiprocessor to itself, and 128 registers a thread.
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kLanes; }
__device__ inline int warp() { return threadIdx.x / kLanes; }

template <class S>
__device__ S& shared_as(size_t offset = 0) {
  return *reinterpret_cast<S*>(shared_memory + offset);
}

// The result has the type of a + b, because divisions of 64 bits are slow in kernels.
template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Asks for 32 bytes, which some thread reads later.
__device__ inline void fetch_to_l2([[maybe_unused]] const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Returns (word & mask) ^ flipped. The compiler would take two instructions if mask and flipped are constants.
__device__ inline uint32_t masked_and_flipped(uint32_t word, uint32_t mask, uint32_t flipped) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(bits) : "r"(word), "r"(mask), "r"(flipped));
  return bits;
#else
  return (word & mask) ^ flipped;
#endif
}

// Returns a * b in one instruction, with which an address may be added.
__device__ inline int64_t wide_product_of(int a, int b) {
#ifdef __CUDACC__
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return int64_t(a) * b;
#endif
}

// Adds up each of kCount values over the lanes of a warp. Afterwards the 32 / kCount lanes from i * (32 / kCount) on
// have the total of value i. Every step halves the number of values that a lane works on.
template <int kCount, int kOffset = kLanes / 2>
__device__ float sum_over_lanes(const float (&values)[kCount]) {
  if constexpr (kOffset == 0) {
    return values[0];
  } else if constexpr (kCount == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], kOffset)};
    return sum_over_lanes<1, kOffset / 2>(sum);
  } else {
    const bool upper = lane() & kOffset;
    float sums[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) {
      const float mine = upper ? values[kCount / 2 + i] : values[i], other = upper ? values[i] : values[kCount / 2 + i];
      sums[i] = mine + __shfl_xor_sync(kAllLanes, other, kOffset);
    }
    return sum_over_lanes<kCount / 2, kOffset / 2>(sums);
  }
}

// Returns the sum of the values of this lane and of the lanes before it.
__device__ inline int sum_up_to_lane(int value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane() >= offset) value += before;
  }
  return value;
}

}  // namespace
