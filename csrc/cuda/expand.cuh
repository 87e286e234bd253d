// The second half of an adapter: sums over the kept rows, Σ z[r] · row_r, in tiles of columns. A block computes a tile.
//
// The threads, or the warps, of a block read the same columns of different rows and have float32 sums of their own.
// These are added up in shared memory in one fixed order.
#pragma once

#include "expand_by_mma.cuh"
#include "expand_by_slices.cuh"
#include "expand_by_threads.cuh"

namespace {

template <int kTokens, class Z, class W, class Done>
__device__ void expand_tile(const Expansion<Z, W>& e, int tile, Done done_with) {
  if constexpr (kInParts<Z>) expand_by_mma<kTokens>(e, tile, done_with);
  else if constexpr (kTokens == 1) expand_one(e, tile, done_with);
  else if constexpr (W::kQuantized) expand_by_slices<kTokens>(e, tile, done_with);
  else expand_several(e, tile, done_with);
}

// Calls f(expansion) with the storage that the rows have.
template <class Z, class W, class F>
__device__ void with_storage(const Expansion<Z, W>& e, F f) {
  with_storage(e.rows, [&](const auto& rows) {
    using Stored = std::decay_t<decltype(rows)>;
    f(Expansion<Z, Stored>{e.z, rows, e.width * kPacket<W> / kPacket<Stored>, e.tiles});
  });
}

// Calls done_with(m, n, sum) for all tokens and the columns of a tile.
template <int kTokens, class Z, class W, class Done>
__device__ void expand(const Expansion<Z, W>& e, int tile, Done done_with) {
  with_storage(e, [&](const auto& stored) { expand_tile<kTokens>(stored, tile, done_with); });
}

// A block prefetches so many bytes of its first tile: what memory delivers while the blocks wait for one another.
constexpr int kAheadBytes = 32 * 1024;

// Prefetches the leading rows. Ranks are sorted by energy, so these are nearly always kept, and memory is idle while
// the blocks wait for one another.
template <class Z, class W>
__device__ void fetch_ahead(const Expansion<Z, W>& any, int bytes = kAheadBytes) {
  with_storage(any, [&](const auto& e) {
    using Stored = std::decay_t<decltype(e.rows)>;
    const int64_t column = (int64_t(blockIdx.x) * e.width + threadIdx.x % e.width) * kPacket<Stored>;
    const int most = bytes / 16 / e.width, count = e.rows.rows < most ? int(e.rows.rows) : most;
    if (column < e.rows.columns)
      for (int row = threadIdx.x / e.width; row < count; row += kThreads / e.width)
        fetch_to_l2(Stored::address(e.rows.at(row, column)));
  });
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
                                : W::kQuantized ? std::max(sizeof(Table), sizeof(SliceSums<kMostColumns<W, kTokens>>))
                                                : sizeof(Table);

}  // namespace
