// How a weight matrix is stored. Each kernel is written once and takes the storage of its weights as a parameter W.
//
// A storage is a small value that is passed in place of a pointer. Kernels use these members only:
//   Element                the type of the x, y and bias that belong to the weights
//   Row                    a position: a row, from some column on. It may be more than a pointer (values and scales).
//   kBits                  bits of memory a column
//   kAddressable           true if a Row is a pointer to Elements, and rows lie `ld` Elements apart
//   rows, columns          the shape
//   kUnit                  columns that a sum treats alike, wherever the piece of a thread begins
//   at(row, column)        the Row of that row from that column on; the column is a multiple of kUnit
//   skip(row, count)       the Row that begins `count` columns later, a multiple of kChunk
//   address(row, n)        the address of column n, for prefetches
//   term(row, value, size, room)   `size` columns of a Row, made ready to be read and multiplied by `value`; `room` has
//                          space for room(size) floats
// A Term has
//   chunk(n)               columns [n, n + kChunk) as float32, in the lane order of Element; for value 1
//   pairs(n)               the same as Elements in natural order, for products of pairs of bfloat16
//   operand(n)             the same in the form that multiply_add takes
//   add_to(sums, n)        adds the value times the columns
// Each also exists with an argument `count`, the columns that are left, for the incomplete chunk at the end of a row.
#pragma once

#include <algorithm>

#include "line_vector.h"

namespace {

// Weights stored as they are multiplied: in the type of x.
template <class T>
struct Plain {
  using Element = T;
  using Row = const T*;
  static constexpr int64_t kBits = 8 * sizeof(T);
  static constexpr bool kAddressable = true;
  static constexpr int64_t kUnit = kChunk;

  const T* data;
  int64_t rows, columns, ld;

  Row at(int64_t row, int64_t column) const { return data + row * ld + column; }

  static Row skip(Row row, int64_t count) { return row + count; }
  static const void* address(Row row, int64_t n) { return row + n; }
  static void ask_for_scales(Row /*row*/, int64_t /*size*/) {}

  struct Term {
    Row row;
    Vec value;

    Chunk chunk(int64_t n) const { return load(row + n); }
    Chunk chunk(int64_t n, int64_t count) const { return load_first(row + n, count); }
    Bits pairs(int64_t n) const { return load_bytes<Bits>(row + n); }
    Bits pairs(int64_t n, int64_t count) const {
      if (count >= kChunk) return pairs(n);
      T padded[kChunk] = {};
      std::memcpy(padded, row + n, count * sizeof(T));
      return load_bytes<Bits>(padded);
    }
    auto operand(int64_t n) const { return load_operand(row + n); }
    auto operand(int64_t n, int64_t count) const { return load_operand_first(row + n, count); }
    template <class... Count>
    void add_to(Chunk& sums, int64_t n, Count... count) const {
      const Chunk w = chunk(n, count...);
      sums.lo += value * w.lo;
      sums.hi += value * w.hi;
    }
  };
  static constexpr int64_t room(int64_t /*size*/) { return 0; }
  static Term term(Row row, float value, int64_t /*size*/, float* /*room*/) { return {row, splat(value)}; }
};

// How many columns take `bytes` bytes of a row.
template <class W>
constexpr int64_t columns_in(int64_t bytes) {
  return 8 * bytes / W::kBits;
}

// The lines of the caches that so many columns take, rounded up.
template <class W>
constexpr int lines_of(int64_t columns) {
  return static_cast<int>((columns * W::kBits / 8 + kLineBytes - 1) / kLineBytes);
}

// Chunks that lie in one line of the caches, or one chunk if it is longer.
template <class W>
constexpr int kLineChunks = columns_in<W>(kLineBytes) > kChunk ? columns_in<W>(kLineBytes) / kChunk : 1;

// Asks memory for `count` columns from n on, which are read later.
template <class W>
inline void ask_for(typename W::Row row, int64_t n, int64_t count = kChunk) {
  for (int64_t i = 0; i < count * W::kBits / 8; i += kLineBytes)
    __builtin_prefetch(static_cast<const char*>(W::address(row, n)) + i);
}

}  // namespace
