// h = B x for a few tokens: dot products with the rows of B, in float32, handed over one by one.
//
// The rows are dealt out in turn to teams of warps, so that every block reads as many as any other. The
// warps of a team split each row between them and meet only when all rows of a round are read: loads stay
// in flight while sums are added up. How a sum is grouped depends on the length of the row alone.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace {

// Contiguous inputs, [count, size].
template <class T>
struct Tokens {
  const T* data;
  int64_t size;
  int count;
};

// B x, as a kernel gets it. `warps_a_row` is a power of two, at most the warps of a block.
template <class T>
struct Projection {
  Tokens<T> x;
  Matrix<T> B;
  int warps_a_row;
  float* h;  // [x.count, B.rows], where the next phase reads it
};

// Rows that a warp reads side by side: so many loads are in flight.
template <bool kWide>
constexpr int kRowsAtOnce = kWide ? 8 : 2;
// Sums that are added up over the lanes in one go.
template <bool kWide, int kTokens>
constexpr int kGroup = std::min(kRowsAtOnce<kWide> * kTokens, kLanes);
template <bool kWide, int kTokens>
using RowSums = float[kRowsAtOnce<kWide> * kTokens / kGroup<kWide, kTokens>][kGroup<kWide, kTokens>];
// Tokens beyond kTokens read a row again, from the cache; no more than this many in all.
template <int kTokens>
constexpr int kMostTokens = kTokens == 8 ? 16 : kTokens;

// The share of each warp in the sums of a round of rows.
template <int kTokens>
struct Partials {
  static constexpr int kRows = 32;
  float at[kWarps<kTokens>][kRows][kMostTokens<kTokens>];
};

// sum number row * kTokens + token += the products at column k, of rows that lie `stride` apart
template <bool kWide, int kTokens, class T>
__device__ void add_products(const T* B, int64_t stride, int rows, const Tokens<T>& x, int first, int64_t k,
                             RowSums<kWide, kTokens>& sums) {
  constexpr int kRows = kRowsAtOnce<kWide>, kSize = kGroup<kWide, kTokens>;
  Packet<T> weights[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (r < rows) weights[r] = stream<kWide>(B + r * stride + k, x.size - k);
#pragma unroll
  for (int m = 0; m < kTokens; m++) {
    if (first + m >= x.count) break;
    const Packet<T> v = read<kWide>(x.data + (first + m) * x.size + k, x.size - k);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float& sum = sums[(r * kTokens + m) / kSize][(r * kTokens + m) % kSize];
#pragma unroll
      for (int i = 0; i < kPacket<T>; i++) sum += weights[r][i] * v[i];
    }
  }
}

// Calls done_with(m, r, B[r] · x[m]), once for each.
template <bool kWide, int kTokens, class T, class Done>
__device__ void project_rows(const Projection<T>& projection, Done done_with) {
  const auto& [x, B, warps_a_row, h] = projection;
  constexpr int kRows = kRowsAtOnce<kWide>, kSize = kGroup<kWide, kTokens>, kShare = kLanes / kSize;
  using Round = Partials<kTokens>;
  Round& partials = shared_as<Round>();
  const int teams_here = kWarps<kTokens> / warps_a_row;
  const int64_t teams = int64_t(gridDim.x) * teams_here, first_team = int64_t(blockIdx.x) * teams_here;
  const int64_t team = first_team + warp() / warps_a_row;
  const int64_t start = (warp() % warps_a_row * kLanes + lane()) * kPacket<T>;

  for (int64_t done = 0; done * teams < B.rows; done += Round::kRows) {
    for (int slot = 0; slot < Round::kRows; slot += kRows) {
      const int64_t row = team + (done + slot) * teams;
      if (row >= B.rows) break;
      const int64_t left = ceil_div(B.rows - row, teams);
      for (int first = 0; first < x.count; first += kTokens) {
        RowSums<kWide, kTokens> sums = {};
        for (int64_t k = start; k < x.size; k += warps_a_row * kLanes * kPacket<T>)
          add_products<kWide, kTokens>(B.data + row * B.ld, teams * B.ld, left < kRows ? int(left) : kRows, x, first, k,
                                       sums);
#pragma unroll
        for (int g = 0; g < kRows * kTokens / kSize; g++) {
          const float sum = sum_over_lanes(sums[g]);
          const int i = g * kSize + lane() / kShare;
          if (lane() % kShare == 0) partials.at[warp()][slot + i / kTokens][first + i % kTokens] = sum;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < teams_here * Round::kRows * x.count; i += kThreads<kTokens>) {
      const int m = i % x.count, slot = i / x.count % Round::kRows, here = i / x.count / Round::kRows;
      const int64_t row = first_team + here + (done + slot) * teams;
      if (row >= B.rows) continue;
      float sum = 0;
      for (int w = 0; w < warps_a_row; w++) sum += partials.at[here * warps_a_row + w][slot][m];
      done_with(m, row, sum);
    }
    __syncthreads();
  }
}

template <int kTokens, class T, class Done>
__device__ void project(const Projection<T>& projection, Done done_with) {
  if (projection.B.wide) project_rows<true, kTokens>(projection, done_with);
  else project_rows<false, kTokens>(projection, done_with);
}

// h[m][r] = B[r] · x[m]; a grid barrier has to follow.
template <int kTokens, class T>
__device__ void project(const Projection<T>& projection) {
  float* const h = projection.h;
  const int64_t ld = projection.B.rows;
  project<kTokens>(projection, [=](int m, int64_t row, float sum) { h[m * ld + row] = sum; });
}

}  // namespace
