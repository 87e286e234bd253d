// Sums over the kept rows, Σ z[r] · row_r, in tiles of columns: a block has a tile to itself.
//
// Its threads, or its warps, read the same columns of different rows, in float32 sums of their own. These meet
// in shared memory, in one fixed order, and are handed over one by one.
#pragma once

#include "expand_by_mma.cuh"
#include "expand_by_threads.cuh"

namespace {

template <bool kWide, int kTokens, class Z, class T, class Done>
__device__ void expand_tile(const Expansion<Z, T>& e, int tile, Done done_with) {
  if constexpr (kExpandedByMma<T, kTokens>) expand_by_mma<kWide, kTokens>(e, tile, done_with);
  else if constexpr (kTokens == 1) expand_one<kWide>(e, tile, done_with);
  else expand_several<kWide>(e, tile, done_with);
}

// Calls done_with(m, n, sum) for all tokens and the columns of a tile.
template <int kTokens, class Z, class T, class Done>
__device__ void expand(const Expansion<Z, T>& e, int tile, Done done_with) {
  if (e.rows.wide) expand_tile<true, kTokens>(e, tile, done_with);
  else expand_tile<false, kTokens>(e, tile, done_with);
}

// So much of the weights is asked for ahead, of a block's first tile: what memory delivers while blocks meet.
constexpr int kAheadBytes = 32 * 1024;

// Asks for the leading rows: ranks are sorted by energy, so these are nearly always on, and memory has nothing else
// to do while the blocks wait for one another.
template <class Z, class T>
__device__ void fetch_ahead(const Expansion<Z, T>& e, int bytes = kAheadBytes) {
  const int64_t column = (int64_t(blockIdx.x) * e.width + threadIdx.x % e.width) * kPacket<T>;
  const int most = bytes / 16 / e.width, count = e.rows.rows < most ? int(e.rows.rows) : most;
  if (column < e.rows.columns)
    for (int row = threadIdx.x / e.width; row < count; row += kThreads / e.width)
      fetch_to_l2(e.rows.data + row * e.rows.ld + column);
}

// Calls f(tile) for the tiles of this block.
template <class Z, class T, class F>
__device__ void for_tiles(const Expansion<Z, T>& e, F f) {
  for (int tile = blockIdx.x; tile < e.tiles; tile += gridDim.x) f(tile);
}

// What comes out of an op: each sum with its bias, rounded once.
template <class T>
struct Output {
  const T* bias;
  T* y;
  int64_t columns;

  __device__ void store(int m, int64_t n, float sum) const {
    y[m * columns + n] = T(bias ? sum + float(bias[n]) : sum);
  }
};

// Bytes of shared memory that the phases of a kernel use, one after the other.
template <class T, int kTokens>
constexpr size_t kExpandBytes = kExpandedByMma<T, kTokens> ? sizeof(WarpSums)
                                : kTokens == 1             ? sizeof(List)
                                                           : sizeof(Table);

}  // namespace
