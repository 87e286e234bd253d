// h = B x for a few tokens: dot products with the rows of B, in float32, handed over one by one.
//
// The rows are dealt out in turn to teams of warps, so that every block reads as many as any other. The
// warps of a team split each row between them and meet only when all rows of a round are read: loads stay
// in flight while sums are added up. How a sum is grouped depends on the length of the row alone.
#pragma once

#include "mma.cuh"

namespace {

// Contiguous inputs, [count, size].
template <class T>
struct Tokens {
  const T* data;
  int size, count;
};

// B x, as a kernel gets it. `warps_a_row` is a power of two, at most the warps of a block.
template <class T>
struct Projection {
  Tokens<T> x;
  Matrix<T> B;
  int warps_a_row;
};

// The share of each warp in the sums of a round of rows.
template <int kTokens>
struct Partials {
  static constexpr int kRows = 32;
  using Row = float[kTokens];
  Row at[kWarps][kRows];
};

// Some rows of B, `stride` apart, from column `first` on. Of no rows nothing is read.
template <class T>
struct Slice {
  const T* rows;
  int64_t stride;
  int count, first;
};

// Products of a slice with all tokens, as a warp adds them up: each of its lanes reads some columns of all rows.
// The weights of the next slice are asked for as soon as those in their place have been multiplied.
template <bool kWide, int kTokens, class T>
struct LaneProducts {
  static constexpr int kRows = kTokens == 1 && kWide ? 8 : kTokens == 16 ? 2 : 4;
  static constexpr int kColumns = kLanes * kPacket<T>;  // of a slice
  static constexpr int kSums = kRows * kTokens, kSize = kSums < kLanes ? kSums : kLanes;

  Packet<T> weights[kRows];
  float sums[kSums / kSize][kSize] = {};  // number row * kTokens + token

  __device__ void read(const Slice<T>& slice, int size) {
    const int column = slice.first + lane() * kPacket<T>;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      weights[r] = {};
      if (r < slice.count && column < size)
        weights[r] = stream<kWide>(slice.rows + r * slice.stride + column, size - column);
    }
  }

  __device__ void add(const Tokens<T>& x, int first, const Slice<T>& next) {
    const int column = first + lane() * kPacket<T>;
#pragma unroll
    for (int m = 0; m < kTokens; m++) {
      if (m >= x.count) break;
      Packet<T> v = {};
      if (column < x.size) v = load<kWide>(x.data + int64_t(m) * x.size + column, x.size - column);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float& sum = sums[(r * kTokens + m) / kSize][(r * kTokens + m) % kSize];
#pragma unroll
        for (int i = 0; i < kPacket<T>; i++) sum += weights[r][i] * v[i];
      }
    }
    read(next, x.size);
  }

  // Leaves what was added up for `rows` rows, and starts anew.
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

// The same on tensor cores. A lane reads four packets of two rows; their places in the row are those of the
// packets that it reads of a token, so that both are operands as they lie in memory.
template <int kTokens, class T>
struct MmaProducts {
  static constexpr int kRows = 16, kSteps = 4;
  static constexpr int kColumns = kSteps * 4 * kPacket<T>;

  Packet<T> weights[kSteps][2];
  float sums[kTokens / 8][4] = {};

  // A lane's columns of a slice: those of step s are kStride s further on.
  static constexpr int kStride = 4 * kPacket<T>;
  __device__ static int column(int first) { return first + member() * kPacket<T>; }

  __device__ void read(const Slice<T>& slice, int size) {
#pragma unroll
    for (int s = 0; s < kSteps; s++) read(slice, size, s);
  }
  __device__ void read(const Slice<T>& slice, int size, int step) {
    const int left = size - column(slice.first);
    const T* const at = slice.rows + group() * slice.stride + column(slice.first);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      weights[step][half] = {};
      if (group() + 8 * half < slice.count && step * kStride < left)
        weights[step][half] = stream<true>(at + 8 * half * slice.stride + step * kStride, left);
    }
  }

  __device__ void add(const Tokens<T>& x, int first, const Slice<T>& next) {
    const int left = x.size - column(first);
    const T* const at = x.data + group() * int64_t(x.size) + column(first);
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const auto &low = weights[s][0].words, &high = weights[s][1].words;
#pragma unroll
      for (int eight = 0; eight < kTokens / 8; eight++) {
        Packet<T> v = {};
        if (8 * eight + group() < x.count && s * kStride < left)
          v = load<true>(at + 8 * eight * int64_t(x.size) + s * kStride, left);
        multiply_add<T>(sums[eight], {low[0], high[0], low[1], high[1]}, {v.words[0], v.words[1]});
        multiply_add<T>(sums[eight], {low[2], high[2], low[3], high[3]}, {v.words[2], v.words[3]});
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

template <bool kWide, int kTokens, class T>
using Products =
    std::conditional_t<kWide && kProjectedByMma<T, kTokens>, MmaProducts<kTokens, T>, LaneProducts<kWide, kTokens, T>>;
// Bytes of a row that a warp reads at a time.
template <class T, int kTokens>
constexpr int64_t kSlice = Products<true, kTokens, T>::kColumns * sizeof(T);

// This warp's part of a round: every `shares`-th slice of `count` rows, `stride` apart, in equal batches.
template <bool kWide, int kTokens, class T>
__device__ void multiply_rows(const T* B, int64_t stride, int count, const Tokens<T>& x, int share, int shares,
                              typename Partials<kTokens>::Row* partials) {
  using Batch = Products<kWide, kTokens, T>;
  const int batch = ceil_div(count, ceil_div(count, Batch::kRows));
  const int begin = share * Batch::kColumns, step = shares * Batch::kColumns;
  const auto rows_from = [&](int row) { return row < count ? min(batch, count - row) : 0; };
  Batch products;
  products.read({B, stride, batch, begin}, x.size);
  int first = begin;
  for (int row = 0; row < count;) {
    const bool ends = first + step >= x.size;
    const int next_row = ends ? row + batch : row;
    const int next_first = ends ? begin : first + step;
    products.add(x, first, {B + next_row * stride, stride, rows_from(next_row), next_first});
    if (ends) products.leave(partials + row, rows_from(row));
    row = next_row, first = next_first;
  }
}

// Calls done_with(m, r, B[r] · x[m]), once for each.
template <bool kWide, int kTokens, class T, class Done>
__device__ void project_rows(const Projection<T>& projection, Done done_with) {
  const auto& [x, B, warps_a_row] = projection;
  using Round = Partials<kTokens>;
  Round& partials = shared_as<Round>();
  const int teams_here = kWarps / warps_a_row, teams = int(gridDim.x) * teams_here;
  const int first_team = int(blockIdx.x) * teams_here, rows = int(B.rows);

  for (int done = 0; int64_t(done) * teams < rows; done += Round::kRows) {
    const int row = first_team + warp() / warps_a_row + done * teams;
    if (row < rows)
      multiply_rows<kWide, kTokens>(B.data + row * B.ld, teams * B.ld, min(ceil_div(rows - row, teams), Round::kRows),
                                    x, warp() % warps_a_row, warps_a_row, partials.at[warp()]);
    __syncthreads();
    for (int i = threadIdx.x; i < teams_here * Round::kRows * x.count; i += kThreads) {
      const int m = i % x.count, slot = i / x.count % Round::kRows, here = i / x.count / Round::kRows;
      const int r = first_team + here + (done + slot) * teams;
      if (r >= rows) continue;
      float sum = 0;
      for (int w = 0; w < warps_a_row; w++) sum += partials.at[here * warps_a_row + w][slot][m];
      done_with(m, r, sum);
    }
    __syncthreads();
  }
}

template <int kTokens, class T, class Done>
__device__ void project(const Projection<T>& projection, Done done_with) {
  if (projection.B.wide) project_rows<true, kTokens>(projection, done_with);
  else project_rows<false, kTokens>(projection, done_with);
}

}  // namespace
