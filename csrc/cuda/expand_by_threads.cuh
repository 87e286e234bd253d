// A tile of an expansion by threads: each thread adds one packet of columns, of one row of every so many.
#pragma once

#include "expansion.cuh"
#include "mask.cuh"

namespace {

// The place of a thread in a tile: it reads a packet of every `slots`-th row, from row `slot` on.
template <class W>
struct Place {
  int slot, slots;
  int64_t column;

  __device__ Place(int width, int tile)
      : slot(threadIdx.x / width),
        slots(kThreads / width),
        column((int64_t(tile) * width + threadIdx.x % width) * kPacket<W>) {}

  __device__ bool reads(const W& rows) const { return slot < slots && column < rows.columns; }
};

// Kept rows of one token and their z, in order.
struct List {
  static constexpr int kLook = kRun * kThreads;  // rows that the threads of a block look at together
  static constexpr int kRows = 11 * 1024;
  int row[kRows];
  float z[kRows];
  int kept[kWarps];  // the number that each warp keeps
};

// Adds the kept ones of List::kLook rows from `first` on to the `listed` ones, and returns how many it then has.
template <class Z>
__device__ int list_rows(List& list, const Z& z, int64_t first, int listed) {
  const int64_t row = first + threadIdx.x * kRun;
  float values[kRun];
  z.run(row, values);
  int kept = 0;
#pragma unroll
  for (int i = 0; i < kRun; i++) kept += values[i] != 0.0f;
  const int up_to = sum_up_to_lane(kept);
  if (lane() == kLanes - 1) list.kept[warp()] = up_to;
  __syncthreads();  // the counts are there, and all reads of the list before are over
  const int of_warp = lane() < kWarps ? list.kept[lane()] : 0, up_to_warp = sum_up_to_lane(of_warp);
  int entry = listed + __shfl_sync(kAllLanes, up_to_warp - of_warp, warp()) + up_to - kept;
#pragma unroll
  for (int i = 0; i < kRun; i++)
    if (values[i] != 0.0f) list.row[entry] = int(row + i), list.z[entry++] = values[i];
  const int added = __shfl_sync(kAllLanes, up_to_warp, kLanes - 1);
  __syncthreads();
  return listed + added;
}

// sums += this thread's share of the rows of a list
template <class W>
__device__ void add_listed(const List& list, int count, const W& rows, const Place<W>& place,
                           float (&sums)[kPacket<W>]) {
  constexpr int kLoads = W::kInPackets ? 8 : 1;  // in flight
  const typename W::Row top = rows.at(0, place.column);
  for (int first = place.slot; first < count; first += kLoads * place.slots) {
    const auto entry = [&](int i) { return first + i * place.slots; };
    typename W::Loaded weights[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      if (entry(i) < count)
        weights[i] = W::stream(W::move(top, rows.stride(1), list.row[entry(i)], 0), rows.columns - place.column);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (entry(i) >= count) break;
      weights[i].add_to(sums, list.z[entry(i)]);
    }
  }
}

// z of some rows for some tokens; further rows and tokens take turns. A row alone decides which thread adds it, so the
// sums of a token do not depend on the other tokens.
struct Table {
  static constexpr int kTokens = 8, kRows = 1024;
  float z[kRows][kTokens];

  __device__ bool wanted(int row) const {
    bool any = false;
#pragma unroll
    for (int m = 0; m < kTokens; m++) any |= z[row][m] != 0.0f;
    return any;
  }
};

// Fills a table with `count` rows from `row` on, for the tokens from `token` on.
template <class Z>
__device__ void fill(Table& table, const Z& z, int token, int64_t row, int count) {
  __syncthreads();  // all reads of the rows before are over
#pragma unroll
  for (int m = 0; m < Table::kTokens; m++)
    for (int r = threadIdx.x; r < count; r += kThreads)
      table.z[r][m] = token + m < z.tokens ? z.value(token + m, row + r) : 0.0f;
  __syncthreads();
}

// sums += this thread's share of the rows of a table, whose first row is `top`. Rows that no token keeps are not read.
template <class W>
__device__ void add_wanted(const Table& table, int count, typename W::Row top, const W& rows, const Place<W>& place,
                           float (&sums)[Table::kTokens][kPacket<W>]) {
  constexpr int kLoads = W::kInPackets ? 4 : 1;  // in flight, if all rows are wanted
  for (int row = place.slot; row < count; row += kLoads * place.slots) {
    const auto at = [&](int i) { return row + i * place.slots; };
    typename W::Loaded weights[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      if (at(i) < count && table.wanted(at(i)))
        weights[i] = W::stream(W::move(top, rows.stride(1), at(i), 0), rows.columns - place.column);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (at(i) >= count) break;
#pragma unroll
      for (int m = 0; m < Table::kTokens; m++) weights[i].add_to(sums[m], table.z[at(i)][m]);
    }
  }
}

// The sums of each thread. After each packet there is a gap, so that lanes store to different banks.
template <class W>
struct ThreadSums {
  struct OfThread {
    float at[kPacket<W>], gap;
  };
  OfThread threads[kThreads];
};

// Adds up the sums of all slots, token by token, and calls done_with(m, n, sum).
template <int kTokens, class W, class Done>
__device__ void add_slots(const float (&sums)[kTokens][kPacket<W>], const Place<W>& place, int tokens, int width,
                          int tile, int64_t N, Done done_with) {
  auto& shared = shared_as<ThreadSums<W>>();
  auto& totals = shared_as<float[kThreads]>();
  const int columns = width * kPacket<W>, parts = kThreads / columns;
  const int column = threadIdx.x % columns, part = threadIdx.x / columns;
  const int64_t n = int64_t(tile) * columns + column;
#pragma unroll
  for (int m = 0; m < kTokens; m++) {
    if (m >= tokens) break;
    __syncthreads();  // all reads of what was there, a list or sums, are over
    if (place.slot < place.slots)
#pragma unroll
      for (int c = 0; c < kPacket<W>; c++) shared.threads[threadIdx.x].at[c] = sums[m][c];
    __syncthreads();
    float sum = 0;
    if (part < parts)
      for (int s = part; s < place.slots; s += parts)
        sum += shared.threads[s * width + column / kPacket<W>].at[column % kPacket<W>];
    __syncthreads();
    totals[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0 || n >= N) continue;
    for (int p = 1; p < parts; p++) sum += totals[p * columns + column];
    done_with(m, n, sum);
  }
}

template <class Z, class W, class Done>
__device__ void expand_one(const Expansion<Z, W>& e, int tile, Done done_with) {
  const Place<W> place(e.width, tile);
  float sums[1][kPacket<W>] = {};
  auto& list = shared_as<List>();
  int listed = 0;
  for (int64_t first = 0; first < e.rows.rows; first += list.kLook) {
    listed = list_rows(list, e.z, first, listed);
    if (first + list.kLook < e.rows.rows && listed + list.kLook <= list.kRows) continue;
    if (place.reads(e.rows)) add_listed(list, listed, e.rows, place, sums[0]);
    listed = 0;
  }
  add_slots<1, W>(sums, place, 1, e.width, tile, e.rows.columns, done_with);
}

template <class Z, class W, class Done>
__device__ void expand_several(const Expansion<Z, W>& e, int tile, Done done_with) {
  const Place<W> place(e.width, tile);
  auto& table = shared_as<Table>();
  for (int token = 0; token < e.z.tokens; token += table.kTokens) {
    float sums[Table::kTokens][kPacket<W>] = {};
    for (int64_t first = 0; first < e.rows.rows; first += table.kRows) {
      const int64_t left = e.rows.rows - first;
      const int count = left < table.kRows ? int(left) : table.kRows;
      fill(table, e.z, token, first, count);
      const typename W::Row top = e.rows.at(first, place.column);
      if (place.reads(e.rows)) add_wanted(table, count, top, e.rows, place, sums);
    }
    add_slots<Table::kTokens, W>(sums, place, e.z.tokens - token, e.width, tile, e.rows.columns,
                                 [&](int m, int64_t n, float sum) { done_with(token + m, n, sum); });
  }
}

}  // namespace
