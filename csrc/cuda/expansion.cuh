// What a sum over the kept rows is made of, Σ z[r] · row_r, and how it is cut up.
#pragma once

#include "mask.cuh"

namespace {

// z rows, rows [R, N], in so many tiles of `width` packets of columns.
template <class Z, class T>
struct Expansion {
  Z z;
  Matrix<T> rows;
  int width, tiles;
};

// The widest tile that a kernel takes: as many columns as it has registers, or shared memory, to add up.
template <class T, int kTokens>
constexpr int kMostColumns = kTokens == 1                                  ? kThreads
                             : kTokens == 16 && kExpandedByMma<T, kTokens> ? 64
                                                                           : 128;
template <class T, int kTokens>
constexpr int kMostPackets = kMostColumns<T, kTokens> / kPacket<T>;

}  // namespace
