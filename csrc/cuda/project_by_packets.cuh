// The products of quantised rows of B on tensor cores.
#pragma once

#include "project_by_mma.cuh"

namespace {

// So many operands of tensor cores add up to an input exactly.
template <class Operand, class T>
constexpr int kInputParts = std::is_same_v<Operand, T> ? 1 : kParts;

// The columns 2 i and 2 i + 1 of inputs, as operands.
template <class Operand, class T>
__device__ void pair_of(const Inputs<T, 8>& x, int i, uint32_t (&parts)[kInputParts<Operand, T>]) {
  if constexpr (std::is_same_v<Operand, T>) {
    parts[0] = x.packets[0].pair(i);
  } else {
    float a = x[2 * i], b = x[2 * i + 1];
#pragma unroll
    for (uint32_t& part : parts) part = split_off_pair(a, b);
  }
}

// The products of a slice with all tokens, like MmaProducts, from whole numbers.
//
// Each packet has a scale, so its sum must stay apart from those of the other three that lie side by side, over which a
// product sums. So a product has two tokens in its eight columns: column 4 t + i has x of token t where the packet of
// member i meets it, and zeros elsewhere.
template <int kTokens, class W>
struct PacketProducts : RowPackets<W> {
  using T = typename W::Element;
  using Operand = std::conditional_t<sizeof(T) == 2, T, bfloat16>;
  using Packets = RowPackets<W>;
  using Packets::column, Packets::kSteps, Packets::kStride, Packets::read, Packets::weights;
  static constexpr int kPairs = (kTokens + 1) / 2;  // of tokens

  // Of each pair of tokens a lane has token member() / 2, and the packets of two of the members.
  float sums[kPairs][2] = {};  // of rows group() and group() + 8

  __device__ void add(const Tokens<T>& x, int first, const Slice<W>& next) {
    const int left = x.size - column(first);
    const T* const at = x.data + group() / 4 * int64_t(x.size) + column(first);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int tokens = group() % 4 == member() && s * kStride < left ? x.count - group() / 4 : 0;
      uint32_t a[kPacket<W> / 4][4];
#pragma unroll
      for (int i = 0; i < kPacket<W>; i++) a[i / 4][i % 4] = weights[s][i % 2].template pair<Operand>(i / 2);
      const Scales scales(weights[s]);
      read(next, x.size, s);
#pragma unroll
      for (int pair = 0; pair < kPairs; pair++) {
        if (pair > 0 && 2 * pair >= x.count) break;
        const T* const of_pair = at + 2 * pair * int64_t(x.size) + s * kStride;
        float products[4] = {};
#pragma unroll
        for (int c = 0; c < kPacket<W>; c += 8)
          multiply(products, &a[c / 4], load_inputs_if<8>(2 * pair < tokens, of_pair + c));
#pragma unroll
        for (int i = 0; i < 4; i++) sums[pair][i / 2] += scales.of[i / 2][i % 2] * products[i];
      }
    }
  }

  __device__ void leave(typename Partials<kTokens>::Row* partials, int rows) {
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float sum = sums[pair][i] + __shfl_xor_sync(kAllLanes, sums[pair][i], 1);
        const int m = 2 * pair + member() / 2, r = group() + 8 * i;
        if (member() % 2 == 0 && m < kTokens && r < rows) partials[r][m] = sum;
        sums[pair][i] = 0;
      }
  }

 private:
  // The scales of the sums that a lane has of a step: of the packets of two members, in rows group() and group() + 8.
  struct Scales {
    float of[2][2];

    __device__ explicit Scales(const typename W::Loaded (&rows)[2]) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int from = 4 * group() + member() % 2 * 2 + i;
        const uint32_t both = __shfl_sync(kAllLanes, rows[0].scale_bits | rows[1].scale_bits << 16, from);
        of[0][i] = half(static_cast<unsigned short>(both), half::from_bits());
        of[1][i] = half(static_cast<unsigned short>(both >> 16), half::from_bits());
      }
    }
  };

  // Adds the products of eight columns.
  __device__ static void multiply(float (&products)[4], const uint32_t (*a)[4], const Inputs<T, 8>& v) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t b[2][kInputParts<Operand, T>];
      pair_of<Operand>(v, 2 * i, b[0]), pair_of<Operand>(v, 2 * i + 1, b[1]);
#pragma unroll
      for (int part = 0; part < kInputParts<Operand, T>; part++)
        multiply_add<Operand>(products, a[i], {b[0][part], b[1][part]});
    }
  }
};

}  // namespace
