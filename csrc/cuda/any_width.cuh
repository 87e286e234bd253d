// Weights whose width, or whose way to be read, is known only when the op is called: an op may mix all of them.
#pragma once

#include "quantized.cuh"

namespace {

// Weights of any width in rows that cannot be read in packets of 16 bytes. Columns are read one by one and multiplied
// by their scales at once.
template <class T>
struct OneByOne {
  using Element = T;
  struct Row {
    const uint8_t* numbers;
    const half* scale;
    int64_t column, columns;
    int group_bits, width;
  };
  struct Stride {
    int64_t numbers, scale;
  };
  struct Loaded {
    static constexpr int kSize = 8;
    float weights[kSize];

    __device__ void add_to(float (&sums)[kSize], float z) const {
#pragma unroll
      for (int i = 0; i < kSize; i++) sums[i] += z * weights[i];
    }
    template <class X>
    __device__ void add_products(float& sum, const X& x) const {
#pragma unroll
      for (int i = 0; i < kSize; i++) sum += weights[i] * x[i];
    }
  };
  static constexpr int kBits = 128 / Loaded::kSize;  // so that a packet has so many columns
  static constexpr bool kQuantized = false, kInPackets = false;

  const uint8_t* data;
  const half* scale;                    // null for weights of type T
  int64_t rows, columns, ld, scale_ld;  // ld in bytes
  int group_bits, width;

  __device__ Row at(int64_t row, int64_t column) const {
    return {data + row * ld, scale + row * scale_ld, column, columns, group_bits, width};
  }
  __device__ Stride stride(int64_t rows) const { return {rows * ld, rows * scale_ld}; }
  __device__ static Row move(Row row, Stride stride, int64_t times, int64_t columns) {
    row.numbers += times * stride.numbers, row.scale += times * stride.scale, row.column += columns;
    return row;
  }
  __device__ static Loaded stream(const Row& row, int64_t count) {
    Loaded loaded;
#pragma unroll
    for (int i = 0; i < Loaded::kSize; i++) loaded.weights[i] = i < count ? weight(row, row.column + i) : 0.0f;
    return loaded;
  }
  __device__ static const void* address(const Row& row) { return row.numbers + row.column * row.width / 8; }
  // Returns the weight in a column of the row that starts at `row`.
  __device__ static float weight(const Row& row, int64_t column) {
    if (row.width > 8) return float(reinterpret_cast<const T*>(row.numbers)[column]);
    const int number = row.width == 8 ? value_of(reinterpret_cast<const int8_t*>(row.numbers), column, row.columns)
                                      : value_of(row.numbers, column, row.columns);
    return float(number) * float(row.scale[column >> row.group_bits]);
  }
};

// Weights that are quantised, or of type T. Kernels get these, and work with one of the storages below.
template <class T>
struct AnyWidth {
  using Element = T;
  static constexpr int kBits = 4;  // of the least width: its packets are whole packets of every width
  static constexpr bool kQuantized = true;

  OneByOne<T> all;
  int64_t rows, columns;
  bool in_packets;

  __device__ Plain<T> plain() const {
    return {reinterpret_cast<const T*>(all.data), rows, columns, all.ld / int64_t(sizeof(T))};
  }
  template <int kWidth>
  __device__ Quantized<T, kWidth> quantized() const {
    return {all.data, all.scale, rows, columns, int(all.ld), int(all.scale_ld), all.group_bits};
  }
};

// Calls f with the storage that the weights have.
template <class T, class F>
__device__ void with_storage(const AnyWidth<T>& weights, F f) {
  if (!weights.in_packets) f(weights.all);
  else if (weights.all.width == 4) f(weights.template quantized<4>());
  else if (weights.all.width == 8) f(weights.template quantized<8>());
  else f(weights.plain());
}
template <class T, class F>
__device__ void with_storage(const Plain<T>& weights, F f) {
  f(weights);
}

}  // namespace
