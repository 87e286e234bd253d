// The products B x as a kernel gets them, and how they are cut up.
#pragma once

#include "any_width.cuh"

namespace {

// Contiguous inputs, [count, size].
template <class T>
struct Tokens {
  const T* data;
  int size, count;
};

// B x. `warps_a_row` is a power of two, at most the number of warps of a block.
template <class W>
struct Projection {
  Tokens<typename W::Element> x;
  W B;
  int warps_a_row;
};

// The share of each warp in the sums of a round of rows.
template <int kTokens>
struct Partials {
  static constexpr int kRows = 32;
  using Row = float[kTokens];
  Row at[kWarps][kRows];
};

// `count` rows of B from `rows` on, `stride` apart, from column `first` on. If there are no rows, nothing is read.
template <class W>
struct Slice {
  typename W::Row rows;
  typename W::Stride stride;
  int count, first;
};

}  // namespace
