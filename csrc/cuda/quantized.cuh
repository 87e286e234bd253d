// Quantised weights: whole numbers of 8 or 4 bits, and a float16 scale for each group of columns (csrc/quantized.h).
//
// A packet lies within one group, because groups have at least 32 columns. So a packet has one scale, which is
// multiplied once: by z, or by the sum of a packet's products.
#pragma once

#include "../quantized.h"
#include "mma.cuh"

namespace {

// Returns whole number i of a word as a float, without a conversion: among the lower bits of a large float, bits count
// as whole numbers. The number, plus an offset that makes it positive, is put there, and the rest is subtracted.
template <int kBits>
__device__ float whole_number(uint32_t word, int i) {
  constexpr int kFirstHalf = 16 / kBits;
  const uint32_t half = i < kFirstHalf ? word : word >> 16;
  const int at = kBits * (i % kFirstHalf), exponent = 23 - at;
  const uint32_t mask = ((1u << kBits) - 1) << at, sign = 1u << (kBits - 1) << at;
  const uint32_t bits = (half & mask) ^ (uint32_t(127 + exponent) << 23 | sign);
  return __uint_as_float(bits) - float((1u << exponent) + (1u << (kBits - 1)));
}

// A packet in registers. The scale stays as it is stored, so that nothing waits for it before it is used.
template <int kBits>
struct QuantizedPacket {
  static constexpr int kSize = 128 / kBits;
  uint32_t words[4];
  uint32_t scale_bits;

  __device__ float scale() const { return half(static_cast<unsigned short>(scale_bits), half::from_bits()); }
  // Returns the whole number of a column.
  __device__ float number(int column) const {
    if constexpr (kBits == 8) return whole_number<8>(words[column / 4], column % 4);
    constexpr int kHalf = rana::kNibbleBlock / 2;
    return whole_number<4>(words[column % kHalf / 4], column % 4 * 2 + column / kHalf);
  }

  __device__ void add_to(float (&sums)[kSize], float z) const {
    const float factor = z * scale();
#pragma unroll
    for (int i = 0; i < kSize; i++) sums[i] += factor * number(i);
  }
  template <class X>
  __device__ void add_products(float& sum, const X& x) const {
    constexpr int kSums = 4;  // which do not wait for one another
    float products[kSums] = {};
#pragma unroll
    for (int i = 0; i < kSize; i++) products[i % kSums] += number(i) * x[i];
    sum += scale() * ((products[0] + products[1]) + (products[2] + products[3]));
  }

  // A scale has 11 bits, so that a weight has at most 15 or 19, and a bfloat16 8.
  static constexpr int kParts = kBits == 4 ? 2 : 3;
  using Operand = bfloat16;
  __device__ void pair(int i, uint32_t (&parts)[kParts]) const {
    float a = number(2 * i) * scale(), b = number(2 * i + 1) * scale();
#pragma unroll
    for (uint32_t& part : parts) part = split_off_pair(a, b);
  }
};

// Weights of kWidth bits beside inputs of type T, in rows that start on 16 bytes and are whole packets.
template <class T, int kWidth>
struct Quantized {
  using Element = T;
  struct Row {
    const uint8_t* numbers;
    const half* scale;
    int64_t column;
    int group_bits;
  };
  struct Stride {
    int64_t numbers, scale;
  };
  using Loaded = QuantizedPacket<kWidth>;
  static constexpr int kBits = kWidth;
  static constexpr bool kQuantized = true;

  const uint8_t* data;
  const half* scale;
  int64_t rows, columns, ld, scale_ld;
  int group_bits;  // a group has 2^group_bits columns, or all

  __device__ Row at(int64_t row, int64_t column) const {
    return {data + row * ld, scale + row * scale_ld, column, group_bits};
  }
  __device__ Stride stride(int64_t rows) const { return {rows * ld, rows * scale_ld}; }
  __device__ static Row move(Row row, Stride stride, int64_t times, int64_t columns) {
    row.numbers += times * stride.numbers, row.scale += times * stride.scale, row.column += columns;
    return row;
  }
  template <bool kWide>
  __device__ static Loaded stream(const Row& row, int64_t /*count*/) {
    static_assert(kWide);
    const auto* const scale = reinterpret_cast<const unsigned short*>(row.scale + (row.column >> row.group_bits));
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address(row)));
    return {{bits.x, bits.y, bits.z, bits.w}, __ldg(scale)};
  }
  __device__ static const void* address(const Row& row) { return row.numbers + row.column * kBits / 8; }
};

// Returns the whole number in a column of a row of any alignment.
__device__ inline int value_of(const int8_t* row, int64_t column, int64_t) { return row[column]; }
__device__ inline int value_of(const uint8_t* row, int64_t column, int64_t columns) {
  constexpr int kBlock = rana::kNibbleBlock, kHalf = kBlock / 2;
  const int64_t first = column / kBlock * kBlock;
  const int i = int(column - first);
  const bool whole = first + kBlock <= columns;
  const int byte = row[first / 2 + (whole ? i % kHalf : i / 2)];
  const bool high = whole ? i >= kHalf : i % 2;
  return ((high ? byte >> 4 : byte & 15) ^ 8) - 8;
}

// The number of bits by which a column is shifted to find its group.
inline int group_bits_of(int64_t columns, int64_t groups) {
  const int64_t group = rana::group_size(columns, groups);
  for (int bits = 5; bits <= 7; bits++)
    if (group == 1 << bits) return bits;
  return 62;  // all columns
}

}  // namespace
