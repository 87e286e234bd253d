// How a weight matrix is stored. Each kernel is written once and takes the storage of its weights as a parameter W.
//
// Weights are read in packets of 16 bytes. Kernels use these members of a storage only:
//   Element                      the type of the x, y and bias that belong to the weights
//   Row                          a position: a row, from some column on. It may be more than a pointer.
//   kBits                        bits of memory a column
//   kQuantized                   whether a weight is a whole number times the scale of its group
//   Loaded                       a packet in registers
//   kInPackets                   whether rows are read 16 bytes at a time, and so is x beside them
//   rows, columns                the shape
//   at(row, column)              the Row of that row from that column on
//   stride(rows)                 the Stride between Rows that are so many rows apart
//   move(row, stride, times, columns)   the Row `times` strides down and `columns` columns to the right
//   stream(row, count)           the packet at a Row that has `count` columns left; columns beyond are zero
//   address(row)                 the address of a Row, for prefetches
// A Loaded has
//   add_to(sums, z)              sums[i] += z times the weight of column i
//   add_products(sum, x)         sum += the weights times x, which has as many columns
//   pair(i)                      for tensor cores: the columns 2 i and 2 i + 1 as Elements, the first one below; of a
//                                quantised packet as whole numbers, in a type of 16 bits that is given
#pragma once

#include <cstring>

#include "device.cuh"

namespace {

// 16 bytes of a row, as they lie in memory. An element is widened where it is used: bytes take fewer registers than
// widened elements.
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
  __device__ uint32_t pair(int i) const { return words[i]; }
  __device__ void add_to(float (&sums)[kSize], float z) const {
#pragma unroll
    for (int i = 0; i < kSize; i++) sums[i] += z * (*this)[i];
  }
  template <class X>
  __device__ void add_products(float& sum, const X& x) const {
#pragma unroll
    for (int i = 0; i < kSize; i++) sum += (*this)[i] * x[i];
  }
};

template <class T>
__device__ Packet<T> packet_of(uint4 bits) {
  return {bits.x, bits.y, bits.z, bits.w};
}

// Returns the first `count` elements at p, and zeros: for rows that do not start on 16 bytes.
template <class T>
__device__ Packet<T> read_one_by_one(const T* p, int64_t count) {
  T elements[Packet<T>::kSize];
#pragma unroll
  for (int i = 0; i < Packet<T>::kSize; i++) elements[i] = i < count ? p[i] : T(0.0f);
  Packet<T> packet;
  memcpy(packet.words, elements, sizeof packet);
  return packet;
}

// Loads a packet of an input, which other threads read again.
template <bool kInPackets, class T>
__device__ Packet<T> load(const T* p, int64_t count) {
  if constexpr (kInPackets) return packet_of<T>(__ldg(reinterpret_cast<const uint4*>(p)));
  else return read_one_by_one(p, count);
}

// So many columns of an input, in packets.
template <class T, int kColumns>
struct Inputs {
  static constexpr int kSize = Packet<T>::kSize;
  static_assert(kColumns % kSize == 0);
  Packet<T> packets[kColumns / kSize];

  __device__ float operator[](int i) const { return packets[i / kSize][i % kSize]; }
};

// Loads the first `count` columns at p; columns beyond are zero.
template <bool kInPackets, int kColumns, class T>
__device__ Inputs<T, kColumns> load_inputs(const T* p, int64_t count) {
  constexpr int kSize = Packet<T>::kSize;
  Inputs<T, kColumns> inputs;
#pragma unroll
  for (int i = 0; i < kColumns / kSize; i++) inputs.packets[i] = load<kInPackets>(p + i * kSize, count - i * kSize);
  return inputs;
}

// Loads the columns at p, or returns zeros, without a branch: the compiler would make one, and lanes would wait for the
// load behind it.
template <int kColumns, class T>
__device__ Inputs<T, kColumns> load_inputs_if([[maybe_unused]] bool wanted, [[maybe_unused]] const T* p) {
  Inputs<T, kColumns> inputs = {};
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kColumns / Packet<T>::kSize; i++) {
    auto& words = inputs.packets[i].words;
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.u32 wanted, %5, 0;\n"
        "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(p + i * Packet<T>::kSize), "r"(uint32_t(wanted)));
  }
#else
  if (wanted) inputs = load_inputs<true, kColumns>(p, kColumns);
#endif
  return inputs;
}

// Weights stored as they are multiplied: in the type of x, in rows that start on 16 bytes and are whole packets.
template <class T>
struct Plain {
  using Element = T;
  using Row = const T*;
  using Stride = int64_t;
  using Loaded = Packet<T>;
  static constexpr int kBits = 8 * sizeof(T);
  static constexpr bool kQuantized = false, kInPackets = true;

  const T* data;
  int64_t rows, columns, ld;

  __device__ Row at(int64_t row, int64_t column) const { return data + row * ld + column; }
  __device__ Stride stride(int64_t rows) const { return rows * ld; }
  __device__ static Row move(Row row, Stride stride, int64_t times, int64_t columns) {
    return row + times * stride + columns;
  }
  // Weights are read once, so they leave the caches first.
  __device__ static Loaded stream(Row row, int64_t /*count*/) {
    return packet_of<T>(__ldcs(reinterpret_cast<const uint4*>(row)));
  }
  __device__ static const void* address(Row row) { return row; }
};

// The columns of a packet.
template <class W>
constexpr int kPacket = 128 / W::kBits;

template <class W>
constexpr int64_t bytes_of(int64_t columns) {
  return columns * W::kBits / 8;
}

}  // namespace
