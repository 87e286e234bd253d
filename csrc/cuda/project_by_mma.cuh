// The products of rows of B on tensor cores.
#pragma once

#include "projection.cuh"

namespace {

// What a warp reads of sixteen rows: a lane has packets of two rows, and four lanes packets that lie side by side.
template <class W>
struct RowPackets {
  static constexpr int kRows = 16, kSteps = W::kQuantized ? 2 : 4;
  static constexpr int kColumns = kSteps * 4 * kPacket<W>;

  typename W::Loaded weights[kSteps][2] = {};

  // The first column of a lane. Its columns of step s start kStride s columns further on.
  static constexpr int kStride = 4 * kPacket<W>;
  __device__ static int column(int first) { return first + member() * kPacket<W>; }

  __device__ void read(const Slice<W>& slice, int size) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) read(slice, size, s);
  }
  __device__ void read(const Slice<W>& slice, int size, int step) {
    const int left = size - column(slice.first);
    const typename W::Row at = W::move(slice.rows, slice.stride, group(), column(slice.first));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Where nothing is read, x is 0, or the sums are not used. Whole numbers may thus stay from before.
      if constexpr (!W::kQuantized) weights[step][half] = {};
      if (group() + 8 * half < slice.count && step * kStride < left)
        weights[step][half] = W::stream(W::move(at, slice.stride, 8 * half, step * kStride), left);
    }
  }
};

// The products of a slice with all tokens, like LaneProducts. A lane reads the same places of a token as of its rows,
// so the packets of both are operands as they lie in memory.
template <int kTokens, class W>
struct MmaProducts : RowPackets<W> {
  using T = typename W::Element;
  using Packets = RowPackets<W>;
  using Packets::column, Packets::kSteps, Packets::kStride, Packets::read, Packets::weights;

  float sums[kTokens / 8][4] = {};

  __device__ void add(const Tokens<T>& x, int first, const Slice<W>& next) {
    const int left = x.size - column(first);
    const T* const at = x.data + group() * int64_t(x.size) + column(first);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const auto &low = weights[s][0], &high = weights[s][1];
#pragma unroll
      for (int eight = 0; eight < kTokens / 8; eight++) {
        Packet<T> v = {};
        if (8 * eight + group() < x.count && s * kStride < left)
          v = load<true>(at + 8 * eight * int64_t(x.size) + s * kStride, left);
        multiply_add<T>(sums[eight], {low.pair(0), high.pair(0), low.pair(1), high.pair(1)}, {v.pair(0), v.pair(1)});
        multiply_add<T>(sums[eight], {low.pair(2), high.pair(2), low.pair(3), high.pair(3)}, {v.pair(2), v.pair(3)});
      }
      read(next, x.size, s);
    }
  }

  __device__ void leave(typename Partials<kTokens>::Row* partials, int rows) {
#pragma unroll
    for (int eight = 0; eight < kTokens / 8; eight++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = group() + i / 2 * 8;
        if (r < rows) partials[r][8 * eight + 2 * member() + i % 2] = sums[eight][i];
        sums[eight][i] = 0;
      }
  }
};

}  // namespace
