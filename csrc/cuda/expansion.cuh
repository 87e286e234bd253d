// A sum over the kept rows, Σ z[r] · row_r, as a kernel gets it, and how it is cut up.
#pragma once

#include "mask.cuh"

namespace {

// z rows, with rows [R, N], in so many tiles of `width` packets of columns.
template <class Z, class W>
struct Expansion {
  Z z;
  W rows;
  int width, tiles;
};

// The widest tile of a kernel: it has registers, or shared memory, for the sums of so many columns.
template <class W, int kTokens>
constexpr int kMostColumns = kTokens == 1                                                   ? kThreads
                             : W::kQuantized || kTokens == 16 && kExpandedByMma<W, kTokens> ? 64
                                                                                            : 128;
template <class W, int kTokens>
constexpr int kMostPackets = kMostColumns<W, kTokens> / kPacket<W>;

}  // namespace
