// The first half of an adapter, h = B x, for a few tokens: dot products with the rows of B in float32.
//
// Teams of warps take turns at the rows, so that every block reads equally many. The warps of a team split each row
// between them and synchronise only after all rows of a round: loads stay in flight while sums are added up. The length
// of a row alone decides how its sum is grouped.
#pragma once

#include "project_by_packets.cuh"
#include "project_by_threads.cuh"

namespace {

template <int kTokens, class W>
using Products = std::conditional_t<
    kProjectedByPackets<W, kTokens>, PacketProducts<kTokens, W>,
    std::conditional_t<kProjectedByMma<W, kTokens>, MmaProducts<kTokens, W>, LaneProducts<kTokens, W>>>;

// Computes this warp's part of a round: every `shares`-th slice of `count` rows from `top` on, `stride` apart, in equal
// batches.
template <int kTokens, class W>
__device__ void multiply_rows(typename W::Row top, typename W::Stride stride, int count,
                              const Tokens<typename W::Element>& x, int share, int shares,
                              typename Partials<kTokens>::Row* partials) {
  using Batch = Products<kTokens, W>;
  const int batch = ceil_div(count, ceil_div(count, Batch::kRows));
  const int begin = share * Batch::kColumns, step = shares * Batch::kColumns;
  const auto rows_from = [&](int row) { return row < count ? min(batch, count - row) : 0; };
  Batch products;
  products.read({top, stride, batch, begin}, x.size);
  int first = begin;
  for (int row = 0; row < count;) {
    const bool ends = first + step >= x.size;
    const int next_row = ends ? row + batch : row;
    const int next_first = ends ? begin : first + step;
    products.add(x, first, {W::move(top, stride, next_row, 0), stride, rows_from(next_row), next_first});
    if (ends) products.leave(partials + row, rows_from(row));
    row = next_row, first = next_first;
  }
}

// Calls done_with(m, r, B[r] · x[m]) once for each m and r.
template <int kTokens, class W, class Done>
__device__ void project_rows(const Projection<W>& projection, Done done_with) {
  const auto& [x, B, warps_a_row] = projection;
  using Round = Partials<kTokens>;
  Round& partials = shared_as<Round>();
  const int teams_here = kWarps / warps_a_row, teams = int(gridDim.x) * teams_here;
  const int first_team = int(blockIdx.x) * teams_here, rows = int(B.rows);

  for (int done = 0; int64_t(done) * teams < rows; done += Round::kRows) {
    const int row = first_team + warp() / warps_a_row + done * teams;
    if (row < rows)
      multiply_rows<kTokens, W>(B.at(row, 0), B.stride(teams), min(ceil_div(rows - row, teams), Round::kRows), x,
                                warp() % warps_a_row, warps_a_row, partials.at[warp()]);
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

template <int kTokens, class W, class Done>
__device__ void project(const Projection<W>& projection, Done done_with) {
  with_storage(projection.B, [&](const auto& B) {
    using Stored = std::decay_t<decltype(B)>;
    project_rows<kTokens>(Projection<Stored>{projection.x, B, projection.warps_a_row}, done_with);
  });
}

}  // namespace
