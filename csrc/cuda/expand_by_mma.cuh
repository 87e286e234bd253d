// A tile of an expansion on tensor cores: each warp adds sixteen rows of every so many, over all columns of the tile.
#pragma once

#include "expansion.cuh"

namespace {

constexpr int kEight = 8;  // packets that a warp reads of four rows, one a lane
template <class W, int kTokens>
constexpr int kPasses = kMostPackets<W, kTokens> / kEight;

// Sets the factors beyond the last of `rows` rows to zero: no thread has written these.
template <int kTokens>
__device__ void cut_off(Factors<kTokens>& factors, int row, int64_t rows) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t left = rows - row - 8 * i - 2 * member();
    const uint32_t there = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
#pragma unroll
    for (int eight = 0; eight < kTokens / 8; eight++)
#pragma unroll
      for (int part = 0; part < kParts; part++) factors.b[eight][part][i] &= there;
  }
}

// Returns which of this lane's four rows some token keeps, as bits: rows 2 member() and the next, and these plus 8.
template <int kTokens>
__device__ unsigned wanted_rows(const Factors<kTokens>& factors) {
  unsigned wanted = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t any = 0;
#pragma unroll
    for (int eight = 0; eight < kTokens / 8; eight++)
#pragma unroll
      for (int part = 0; part < kParts; part++) any |= factors.b[eight][part][i];
    wanted |= ((any & 0x7fffu ? 1u : 0u) | (any & 0x7fff0000u ? 2u : 0u)) << 2 * i;
  }
#pragma unroll
  for (int offset = 4; offset < kLanes; offset *= 2) wanted |= __shfl_xor_sync(kAllLanes, wanted, offset);
  return wanted;
}

// The sums of a lane. [j] are the columns 2 j and 2 j + 1 of its packet, which multiply_add takes as lines of weights.
template <class W, int kTokens>
using TileSums = float[kPasses<W, kTokens>][kTokens / 8][kPacket<W> / 2][4];

// The sums of each warp for eight tokens and eight packets of columns. After each packet there is a gap, so that lanes
// store to different banks.
template <class W>
struct WarpSums {
  struct OfPacket {
    float at[kPacket<W>][8], gap[8];
  };
  OfPacket packets[kWarps][kEight];
};

// Adds up the sums of all warps for a pass and eight tokens, and calls done_with(m, n, sum).
template <class W, class Done>
__device__ void add_warps(const float (&sums)[kPacket<W> / 2][4], int first_packet, int width, int first_token,
                          int tokens, int tile, int64_t N, Done done_with) {
  constexpr int kColumns = kPacket<W>;
  auto& shared = shared_as<WarpSums<W>>();
  __syncthreads();  // all reads of what was there are over
#pragma unroll
  for (int j = 0; j < kColumns / 2; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) shared.packets[warp()][group()].at[2 * j + i / 2][2 * member() + i % 2] = sums[j][i];
  __syncthreads();
  static_assert(kThreads == kEight * kColumns * 8);
  const int m = first_token + threadIdx.x % 8, column = threadIdx.x / 8 % kColumns, packet = warp() / 2;
  const int64_t n = (int64_t(tile) * width + first_packet + packet) * kColumns + column;
  if (m >= tokens || first_packet + packet >= width || n >= N) return;
  float sum = 0;
  for (int w = 0; w < kWarps; w++) sum += shared.packets[w][packet].at[column][m % 8];
  done_with(m, n, sum);
}

// sums += z rows, for eight packets of columns of sixteen rows
template <class W, int kTokens>
__device__ void add_rows(const typename W::Loaded (&weights)[4], const Factors<kTokens>& z,
                         float (&sums)[kTokens / 8][kPacket<W> / 2][4]) {
  constexpr int kPairs = kPacket<W> / 2;
  uint32_t a[kPairs][4];
#pragma unroll
  for (int j = 0; j < kPairs; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)  // columns 2 j are the lower halves of the pairs, columns 2 j + 1 the upper halves
      a[j][i] = __byte_perm(weights[i / 2 * 2].pair(j), weights[i / 2 * 2 + 1].pair(j), i % 2 ? 0x7632 : 0x5410);
  // Consecutive products go to different sums, so that they do not wait for one another.
#pragma unroll
  for (int part = 0; part < kParts; part++)
#pragma unroll
    for (int j = 0; j < kPairs; j++)
#pragma unroll
      for (int eight = 0; eight < kTokens / 8; eight++) multiply_add<bfloat16>(sums[eight][j], a[j], z.b[eight][part]);
}

// A warp takes sixteen rows after sixteen rows. As soon as weights have been multiplied, the next weights are loaded in
// their place.
template <int kTokens, class Z, class W, class Done>
__device__ void expand_by_mma(const Expansion<Z, W>& e, int tile, Done done_with) {
  constexpr int kStep = 16 * kWarps;
  const auto& rows = e.rows;
  const int count = int(rows.rows), column = (tile * e.width + group()) * kPacket<W>;
  const int left = int(rows.columns) - column;
  const typename W::Row mine = rows.at(2 * member(), column);
  const typename W::Stride stride = rows.stride(1);
  TileSums<W, kTokens> sums = {};
  typename W::Loaded weights[kPasses<W, kTokens>][4];
  const auto wanted_of = [&](auto& z, int first) {
    if (first + 16 > count) cut_off(z, first, count);
    return wanted_rows(z);
  };
  const auto read = [&](int pass, unsigned wanted, int first) {
    constexpr int kColumns = kEight * kPacket<W>;
    if (pass * kEight + group() >= e.width || pass * kColumns >= left) wanted = 0;
    const typename W::Row at = W::move(mine, stride, first, pass * kColumns);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      weights[pass][r] = {};
      if (wanted >> r & 1)
        weights[pass][r] = W::stream(W::move(at, stride, r % 2 + r / 2 * 8, 0), left - pass * kColumns);
    }
  };
  const int begin = 16 * warp();
  auto z = e.z.factors(begin), next = e.z.factors(begin + kStep);
  const unsigned wanted_first = wanted_of(z, begin);
#pragma unroll
  for (int pass = 0; pass < kPasses<W, kTokens>; pass++) read(pass, wanted_first, begin);
  for (int first = begin; first < count; first += kStep) {
    const unsigned wanted = wanted_of(next, first + kStep);
#pragma unroll
    for (int pass = 0; pass < kPasses<W, kTokens>; pass++) {
      if (pass * kEight >= e.width) break;
      add_rows<W>(weights[pass], z, sums[pass]);
      read(pass, wanted, first + kStep);
    }
    z = next;
    next = e.z.factors(first + 2 * kStep);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses<W, kTokens>; pass++)
#pragma unroll
    for (int eight = 0; eight < kTokens / 8; eight++)
      if (pass * kEight < e.width && eight * 8 < e.z.tokens)
        add_warps<W>(sums[pass][eight], pass * kEight, e.width, eight * 8, e.z.tokens, tile, rows.columns, done_with);
}

}  // namespace
