// The second half of an adapter: sums over the kept rows, Σ z[r] · row_r, in tiles of columns. A block computes a tile.
//
// The threads, or the warps, of a block read the same columns of different rows and have float32 sums of their own.
// These are added up in shared memory in one fixed order.
#pragma once

#include "expand_by_mma.cuh"
#include "expand_by_threads.cuh"

namespace {

template <bool kWide, int kTokens, class Z, class W, class Done>
__device__ void expand_tile(const Expansion<Z, W>& e, int tile, Done done_with) {
  if constexpr (kExpandedByMma<W, kTokens>) expand_by_mma<kWide, kTokens>(e, tile, done_with);
  else if constexpr (kTokens == 1) expand_one<kWide>(e, tile, done_with);
  else expand_several<kWide>(e, tile, done_with);
}

// Calls done_with(m, n, sum) for all tokens and the columns of a tile.
template <int kTokens, class Z, class W, class Done>
__device__ void expand(const Expansion<Z, W>& e, int tile, Done done_with) {
  if (e.rows.wide) expand_tile<true, kTokens>(e, tile, done_with);
  else expand_tile<false, kTokens>(e, tile, done_with);
}

// A block prefetches so many bytes of its first tile: what memory delivers while the blocks wait for one another.
constexpr int kAheadBytes = 32 * 1024;

// Prefetches the leading rows. Ranks are sorted by energy, so these are nearly always kept, and memory is idle while
// the blocks wait for one another.
template <class Z, class W>
__device__ void fetch_ahead(const Expansion<Z, W>& e, int bytes = kAheadBytes) {
  const int64_t column = (int64_t(blockIdx.x) * e.width + threadIdx.x % e.width) * kPacket<W>;
  const int most = bytes / 16 / e.width, count = e.rows.rows < most ? int(e.rows.rows) : most;
  if (column < e.rows.columns)
    for (int row = threadIdx.x / e.width; row < count; row += kThreads / e.width)
      fetch_to_l2(W::address(e.rows.at(row, column)));
}

// Calls f(tile) for the tiles of this block.
template <class Z, class W, class F>
__device__ void for_tiles(const Expansion<Z, W>& e, F f) {
  for (int tile = blockIdx.x; tile < e.tiles; tile += gridDim.x) f(tile);
}

// The output of an op: each sum plus its bias, rounded once.
template <class T>
struct Output {
  const T* bias;
  T* y;
  int64_t columns;

  __device__ void store(int m, int64_t n, float sum) const {
    y[m * columns + n] = T(bias ? sum + float(bias[n]) : sum);
  }
};

// Bytes of shared memory of an expansion, whose phases use the same memory one after the other.
template <class W, int kTokens>
constexpr size_t kExpandBytes = kExpandedByMma<W, kTokens> ? sizeof(WarpSums<W>)
                                : kTokens == 1             ? sizeof(List)
                                                           : sizeof(Table);

}  // namespace
