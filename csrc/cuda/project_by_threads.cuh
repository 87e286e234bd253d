// The products of rows of B by threads.
#pragma once

#include "projection.cuh"

namespace {

// The products of a slice with all tokens, added up by a warp. Each lane reads some columns of all rows. As soon as
// weights have been multiplied, those of the next slice are loaded in their place.
template <int kTokens, class W>
struct LaneProducts {
  using T = typename W::Element;
  static constexpr int kRows = kTokens == 1 && W::kInPackets ? 8 : kTokens == 16 ? 2 : 4;
  static constexpr int kColumns = kLanes * kPacket<W>;  // of a slice
  static constexpr int kSums = kRows * kTokens, kSize = kSums < kLanes ? kSums : kLanes;

  typename W::Loaded weights[kRows];
  float sums[kSums / kSize][kSize] = {};  // number row * kTokens + token

  __device__ void read(const Slice<W>& slice, int size) {
    const int column = slice.first + lane() * kPacket<W>;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      weights[r] = {};
      if (r < slice.count && column < size)
        weights[r] = W::stream(W::move(slice.rows, slice.stride, r, column), size - column);
    }
  }

  __device__ void add(const Tokens<T>& x, int first, const Slice<W>& next) {
    const int column = first + lane() * kPacket<W>;
#pragma unroll
    for (int m = 0; m < kTokens; m++) {
      if (m >= x.count) break;
      Inputs<T, kPacket<W>> v = {};
      if (column < x.size)
        v = load_inputs<W::kInPackets, kPacket<W>>(x.data + int64_t(m) * x.size + column, x.size - column);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int i = r * kTokens + m;
        weights[r].add_products(sums[i / kSize][i % kSize], v);
      }
    }
    read(next, x.size);
  }

  // Stores the sums of `rows` rows and starts new ones.
  __device__ void leave(typename Partials<kTokens>::Row* partials, int rows) {
    constexpr int kSharing = kLanes / kSize;  // lanes that end with the same sum
#pragma unroll
    for (int g = 0; g < kSums / kSize; g++) {
      const float sum = sum_over_lanes(sums[g]);
      const int i = g * kSize + lane() / kSharing;
      if (lane() % kSharing == 0 && i / kTokens < rows) partials[i / kTokens][i % kTokens] = sum;
#pragma unroll
      for (float& started : sums[g]) started = 0;
    }
  }
};

}  // namespace
