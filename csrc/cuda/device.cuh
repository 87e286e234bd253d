// What the kernels are made of: threads, 16-byte packets of a row, sums over a warp, shared memory.
#pragma once

#include <cooperative_groups.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// The shared memory of a block. Each phase of a kernel lays its own structure over it.
extern __shared__ __align__(16) unsigned char shared_memory[];

namespace {

using bfloat16 = torch::headeronly::BFloat16;
using half = torch::headeronly::Half;

constexpr int kLanes = 32;  // of a warp
// A block of the decode kernels. It has a multiprocessor to itself, and 128 registers a thread.
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kLanes; }
__device__ inline int warp() { return threadIdx.x / kLanes; }

template <class S>
__device__ S& shared_as(size_t offset = 0) {
  return *reinterpret_cast<S*>(shared_memory + offset);
}

// In the type of a + b: kernels have no time for divisions of 64 bits.
template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// A matrix in memory, its rows contiguous. `wide`: all of it can be read 16 bytes at a time.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, ld;
  bool wide;
};

// 16 bytes of a row, as they lie in memory: an element is widened where it is used, which takes fewer
// registers than elements do.
template <class T>
struct Packet {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];

  __device__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(words[i]);
    const uint32_t word = words[i / 2];
    if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    return half(static_cast<unsigned short>(i % 2 ? word >> 16 : word), half::from_bits());
  }
};
template <class T>
constexpr int kPacket = Packet<T>::kSize;

template <class T>
__device__ Packet<T> packet_of(uint4 bits) {
  return {bits.x, bits.y, bits.z, bits.w};
}

// The first `count` elements at p, and zeros: for rows that do not lie on 16 bytes.
template <class T>
__device__ Packet<T> read_one_by_one(const T* p, int64_t count) {
  T elements[kPacket<T>];
#pragma unroll
  for (int i = 0; i < kPacket<T>; i++) elements[i] = i < count ? p[i] : T(0.0f);
  Packet<T> packet;
  memcpy(packet.words, elements, sizeof packet);
  return packet;
}

// Weights: read once, and the first to leave the caches.
template <bool kWide, class T>
__device__ Packet<T> stream(const T* p, int64_t count) {
  if constexpr (kWide) return packet_of<T>(__ldcs(reinterpret_cast<const uint4*>(p)));
  else return read_one_by_one(p, count);
}

// Asks for 32 bytes, for whoever reads them next.
__device__ inline void fetch_to_l2([[maybe_unused]] const void* p) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Inputs: read again and again.
template <bool kWide, class T>
__device__ Packet<T> load(const T* p, int64_t count) {
  if constexpr (kWide) return packet_of<T>(__ldg(reinterpret_cast<const uint4*>(p)));
  else return read_one_by_one(p, count);
}

// Adds up each of kCount values over the lanes of a warp. The total of value i is then with the
// 32 / kCount lanes from i * (32 / kCount) on. Every step halves the values that a lane is concerned with.
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

// Sum of the values of this lane and those before it.
__device__ inline int sum_up_to_lane(int value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane() >= offset) value += before;
  }
  return value;
}

}  // namespace
