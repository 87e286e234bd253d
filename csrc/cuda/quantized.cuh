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
  const uint32_t around = i < kFirstHalf ? word : word >> 16;
  const int at = kBits * (i % kFirstHalf), exponent = 23 - at;
  const uint32_t mask = ((1u << kBits) - 1) << at, sign = 1u << (kBits - 1) << at;
  const uint32_t bits = masked_and_flipped(around, mask, uint32_t(127 + exponent) << 23 | sign);
  return __uint_as_float(bits) - float((1u << exponent) + (1u << (kBits - 1)));
}

// Returns the lowest whole number of each half of a word as a pair of 16-bit floats, in the same way as whole_number.
// bfloat16 has too few bits for numbers of 8.
template <int kBits, class T>
__device__ uint32_t whole_numbers(uint32_t word) {
  static_assert(kBits == 4 || std::is_same_v<T, half>);
  constexpr uint32_t kBoth = 0x00010001u, kMask = ((1u << kBits) - 1) * kBoth, kSign = (1u << (kBits - 1)) * kBoth;
  constexpr uint32_t kLarge = (std::is_same_v<T, bfloat16> ? 0x4300u : 0x6400u) * kBoth;  // 128 or 1024
  return add_pairs<T>(masked_and_flipped(word, kMask, kLarge | kSign), (kLarge | kSign) ^ 0x80008000u);
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

  template <class T>
  __device__ uint32_t pair(int i) const {
    if constexpr (kBits == 8 && std::is_same_v<T, bfloat16>) {
      return upper_halves(number(2 * i), number(2 * i + 1));
    } else {
      // the bytes that hold the two columns, one in each half of a word
      constexpr int kColumns = kBits == 8 ? kSize : rana::kNibbleBlock / 2;
      const uint32_t word = words[2 * i % kColumns / 4], bytes = __byte_perm(word, 0, i % 2 ? 0x4342 : 0x4140);
      return whole_numbers<kBits, T>(bytes >> 2 * i / kColumns * 4);
    }
  }
};

// Rows of Quantized are at most so far apart. That times the warps of a card fits 31 bits.
constexpr int kMostBytesApart = 1 << 19;

// Weights of kWidth bits beside inputs of type T, in rows that start on 16 bytes and are whole packets.
template <class T, int kWidth>
struct Quantized {
  using Element = T;
  struct Row {
    const uint8_t* numbers;
    const half* scale;  // of the first column of the row
    int column, group_bits;
  };
  struct Stride {
    int numbers, scale;
  };
  using Loaded = QuantizedPacket<kWidth>;
  static constexpr int kBits = kWidth;
  static constexpr bool kQuantized = true, kInPackets = true;

  const uint8_t* data;
  const half* scale;
  int64_t rows, columns;
  int ld, scale_ld;  // at most kMostBytesApart, so that addresses take few instructions
  int group_bits;    // a group has 2^group_bits columns, or all

  __device__ Row at(int64_t row, int64_t column) const {
    return {data + wide_product_of(int(row), ld) + column * kBits / 8, scale + wide_product_of(int(row), scale_ld),
            int(column), group_bits};
  }
  __device__ Stride stride(int rows) const { return {rows * ld, rows * scale_ld}; }
  __device__ static Row move(Row row, Stride stride, int times, int columns) {
    row.numbers += wide_product_of(times, stride.numbers) + columns * kBits / 8;
    row.scale += wide_product_of(times, stride.scale);
    row.column += columns;
    return row;
  }
  __device__ static Loaded stream(const Row& row, int64_t /*count*/) {
    const auto* const scale = reinterpret_cast<const unsigned short*>(row.scale + (row.column >> row.group_bits));
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address(row)));
    return {{bits.x, bits.y, bits.z, bits.w}, __ldg(scale)};
  }
  __device__ static const void* address(const Row& row) { return row.numbers; }
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

}  // namespace
