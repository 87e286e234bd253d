// The products of rows of B on tensor cores.
#pragma once

#include "projection.cuh"

namespace {

constexpr int kMmaSteps = 4;

// So many operands of tensor cores add up to an input exactly.
template <class Operand, class T>
constexpr int kInputParts = std::is_same_v<Operand, T> ? 1 : sizeof(T) == 2 ? 2 : 3;

// The columns 2 i and 2 i + 1 of inputs, as operands.
template <class Operand, class T>
__device__ void pair_of(const Inputs<T, 8>& x, int i, uint32_t (&parts)[kInputParts<Operand, T>]) {
  if constexpr (std::is_same_v<Operand, T>) {
    x.packets[0].pair(i, parts);
  } else {
    float a = x[2 * i], b = x[2 * i + 1];
#pragma unroll
    for (uint32_t& part : parts) part = split_off_pair(a, b);
  }
}

// The products of a slice with all tokens, like LaneProducts. A lane reads four packets of two rows. It reads the same
// places of a token, so the packets of both are operands as they lie in memory.
template <int kTokens, class W>
struct MmaProducts {
  using T = typename W::Element;
  using Operand = typename W::Loaded::Operand;
  static constexpr int kRows = 16, kSteps = kMmaSteps, kParts = W::Loaded::kParts;
  static constexpr int kColumns = kSteps * 4 * kPacket<W>;

  typename W::Loaded weights[kSteps][2];
  float sums[kTokens / 8][4] = {};

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
      weights[step][half] = {};
      if (group() + 8 * half < slice.count && step * kStride < left)
        weights[step][half] = W::template stream<true>(W::move(at, slice.stride, 8 * half, step * kStride), left);
    }
  }

  __device__ void add(const Tokens<T>& x, int first, const Slice<W>& next) {
    const int left = x.size - column(first);
    const T* const at = x.data + group() * int64_t(x.size) + column(first);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const auto &low = weights[s][0], &high = weights[s][1];
#pragma unroll
      for (int c = 0; c < kPacket<W>; c += 8)
#pragma unroll
        for (int eight = 0; eight < kTokens / 8; eight++) {
          if (W::kQuantized && 8 * eight >= x.count) break;
          Inputs<T, 8> v = {};
          if (8 * eight + group() < x.count && s * kStride < left)
            v = load_inputs<true, 8>(at + 8 * eight * int64_t(x.size) + s * kStride + c, left);
#pragma unroll
          for (int i = 0; i < 4; i += 2) add_four(sums[eight], low, high, c / 2 + i, v, i);
        }
      read(next, x.size, s);
    }
  }

  // Adds the products of four columns: from 2 i on of the weights, from 2 j on of the inputs.
  __device__ static void add_four(float (&sum)[4], const typename W::Loaded& low, const typename W::Loaded& high, int i,
                                  const Inputs<T, 8>& v, int j) {
    uint32_t a[4][kParts], b[2][kInputParts<Operand, T>];
    low.pair(i, a[0]), high.pair(i, a[1]), low.pair(i + 1, a[2]), high.pair(i + 1, a[3]);
    pair_of<Operand>(v, j, b[0]), pair_of<Operand>(v, j + 1, b[1]);
#pragma unroll
    for (int part = 0; part < kParts; part++)
#pragma unroll
      for (int of_x = 0; of_x < kInputParts<Operand, T>; of_x++)
        multiply_add<Operand>(sum, {a[0][part], a[1][part], a[2][part], a[3][part]}, {b[0][of_x], b[1][of_x]});
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
