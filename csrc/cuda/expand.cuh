// Sums over the kept rows, Σ z[r] · row_r, in tiles of columns: a block has a tile to itself.
//
// Its threads, or its warps, read the same columns of different rows, in float32 sums of their own. These meet
// in shared memory, in one fixed order, and are handed over one by one.
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

// ---- for threads: each has one packet of every so many rows ----

// Where a thread stands in a tile: at a packet of the rows from number `slot` on, every `slots`-th.
template <class T>
struct Place {
  int slot, slots;
  int64_t column;

  __device__ Place(int width, int tile)
      : slot(threadIdx.x / width),
        slots(kThreads / width),
        column((int64_t(tile) * width + threadIdx.x % width) * kPacket<T>) {}

  __device__ bool reads(const Matrix<T>& rows) const { return slot < slots && column < rows.columns; }
};

// Kept rows of one token and their z, in order.
struct List {
  static constexpr int kLook = kRun * kThreads;  // rows that the threads of a block look at together
  static constexpr int kRows = 11 * 1024;
  int row[kRows];
  float z[kRows];
  int kept[kWarps];  // by each warp
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
  __syncthreads();  // the counts are there, and nobody reads what was listed before
  const int of_warp = lane() < kWarps ? list.kept[lane()] : 0, up_to_warp = sum_up_to_lane(of_warp);
  int entry = listed + __shfl_sync(kAllLanes, up_to_warp - of_warp, warp()) + up_to - kept;
#pragma unroll
  for (int i = 0; i < kRun; i++)
    if (values[i] != 0.0f) list.row[entry] = int(row + i), list.z[entry++] = values[i];
  const int added = __shfl_sync(kAllLanes, up_to_warp, kLanes - 1);
  __syncthreads();
  return listed + added;
}

// sums += the rows of a list that fall to this thread
template <bool kWide, class T>
__device__ void add_listed(const List& list, int count, const Matrix<T>& rows, const Place<T>& place,
                           float (&sums)[kPacket<T>]) {
  constexpr int kLoads = kWide ? 8 : 1;  // in flight
  const T* const data = rows.data + place.column;
  for (int first = place.slot; first < count; first += kLoads * place.slots) {
    const auto entry = [&](int i) { return first + i * place.slots; };
    Packet<T> weights[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      if (entry(i) < count)
        weights[i] = stream<kWide>(data + list.row[entry(i)] * rows.ld, rows.columns - place.column);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (entry(i) >= count) break;
      const float z = list.z[entry(i)];
#pragma unroll
      for (int c = 0; c < kPacket<T>; c++) sums[c] += z * weights[i][c];
    }
  }
}

// z of some rows for some tokens; more take turns. Which thread adds up a row depends on the row alone, so that a
// token's sums have the same bits in any company.
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
  __syncthreads();  // nobody reads the rows before any more
#pragma unroll
  for (int m = 0; m < Table::kTokens; m++)
    for (int r = threadIdx.x; r < count; r += kThreads)
      table.z[r][m] = token + m < z.tokens ? z.value(token + m, row + r) : 0.0f;
  __syncthreads();
}

// sums += the rows of a table that fall to this thread; those that no token wants are not read
template <bool kWide, class T>
__device__ void add_wanted(const Table& table, int count, const T* data, const Matrix<T>& rows, const Place<T>& place,
                           float (&sums)[Table::kTokens][kPacket<T>]) {
  constexpr int kLoads = kWide ? 4 : 1;  // in flight, if all are wanted
  for (int row = place.slot; row < count; row += kLoads * place.slots) {
    const auto at = [&](int i) { return row + i * place.slots; };
    Packet<T> weights[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      if (at(i) < count && table.wanted(at(i)))
        weights[i] = stream<kWide>(data + at(i) * rows.ld, rows.columns - place.column);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (at(i) >= count) break;
#pragma unroll
      for (int m = 0; m < Table::kTokens; m++)
#pragma unroll
        for (int c = 0; c < kPacket<T>; c++) sums[m][c] += table.z[at(i)][m] * weights[i][c];
    }
  }
}

template <class T>
using ThreadSums = float[kThreads * kPacket<T>];

// Adds up the sums of all slots, token by token, and calls done_with(m, n, sum).
template <int kTokens, class T, class Done>
__device__ void add_slots(const float (&sums)[kTokens][kPacket<T>], const Place<T>& place, int tokens, int width,
                          int tile, int64_t N, Done done_with) {
  auto& at = shared_as<ThreadSums<T>>();
  const int columns = width * kPacket<T>, parts = kThreads / columns;
  const int column = threadIdx.x % columns, part = threadIdx.x / columns;
  const int64_t n = int64_t(tile) * columns + column;
#pragma unroll
  for (int m = 0; m < kTokens; m++) {
    if (m >= tokens) break;
    __syncthreads();  // nobody reads what lies there any more: a list, or sums
    if (place.slot < place.slots)
#pragma unroll
      for (int c = 0; c < kPacket<T>; c++) at[threadIdx.x * kPacket<T> + c] = sums[m][c];
    __syncthreads();
    float sum = 0;
    if (part < parts)
      for (int s = part; s < place.slots; s += parts) sum += at[s * columns + column];
    __syncthreads();
    at[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0 || n >= N) continue;
    for (int p = 1; p < parts; p++) sum += at[p * columns + column];
    done_with(m, n, sum);
  }
}

template <bool kWide, class Z, class T, class Done>
__device__ void expand_one(const Expansion<Z, T>& e, int tile, Done done_with) {
  const Place<T> place(e.width, tile);
  float sums[1][kPacket<T>] = {};
  auto& list = shared_as<List>();
  int listed = 0;
  for (int64_t first = 0; first < e.rows.rows; first += list.kLook) {
    listed = list_rows(list, e.z, first, listed);
    if (first + list.kLook < e.rows.rows && listed + list.kLook <= list.kRows) continue;
    if (place.reads(e.rows)) add_listed<kWide>(list, listed, e.rows, place, sums[0]);
    listed = 0;
  }
  add_slots<1, T>(sums, place, 1, e.width, tile, e.rows.columns, done_with);
}

template <bool kWide, class Z, class T, class Done>
__device__ void expand_several(const Expansion<Z, T>& e, int tile, Done done_with) {
  const Place<T> place(e.width, tile);
  auto& table = shared_as<Table>();
  for (int token = 0; token < e.z.tokens; token += table.kTokens) {
    float sums[Table::kTokens][kPacket<T>] = {};
    for (int64_t first = 0; first < e.rows.rows; first += table.kRows) {
      const int64_t left = e.rows.rows - first;
      const int count = left < table.kRows ? int(left) : table.kRows;
      fill(table, e.z, token, first, count);
      const T* const data = e.rows.data + first * e.rows.ld + place.column;
      if (place.reads(e.rows)) add_wanted<kWide>(table, count, data, e.rows, place, sums);
    }
    add_slots<Table::kTokens, T>(sums, place, e.z.tokens - token, e.width, tile, e.rows.columns,
                                 [&](int m, int64_t n, float sum) { done_with(token + m, n, sum); });
  }
}

// ---- for tensor cores: each warp has sixteen of every so many rows, over the whole tile ----

constexpr int kEight = 8;  // packets that a warp reads of four rows, one a lane
template <int kTokens>
constexpr int kPasses = kMostPackets<bfloat16, kTokens> / kEight;

// Zeros in place of what is beyond the last of `rows` rows, which nobody wrote.
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

// Which of this lane's four rows some token wants, as bits: 2 member() and the next, and these plus 8.
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

// sums of columns 2 j and 2 j + 1 of the lane's packet, as multiply_add counts weights
template <int kTokens>
using TileSums = float[kPasses<kTokens>][kTokens / 8][kPacket<bfloat16> / 2][4];

// The sums of each warp for eight tokens and eight packets of columns. Those of a packet are followed by a gap, so
// that lanes store theirs to different banks.
struct WarpSums {
  struct OfPacket {
    float at[kPacket<bfloat16>][8], gap[8];
  };
  OfPacket packets[kWarps][kEight];
};

// Adds up the sums of all warps for a pass and eight tokens, and calls done_with(m, n, sum).
template <class Done>
__device__ void add_warps(const float (&sums)[4][4], int first_packet, int width, int first_token, int tokens, int tile,
                          int64_t N, Done done_with) {
  constexpr int kColumns = kPacket<bfloat16>;
  auto& shared = shared_as<WarpSums>();
  __syncthreads();  // nobody reads what lies there any more
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
template <int kTokens>
__device__ void add_rows(const Packet<bfloat16> (&weights)[4], const Factors<kTokens>& z,
                         float (&sums)[kTokens / 8][kPacket<bfloat16> / 2][4]) {
  constexpr int kPairs = kPacket<bfloat16> / 2;
  uint32_t a[kPairs][4];
#pragma unroll
  for (int j = 0; j < kPairs; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)  // columns 2 j are the lower halves of the words, columns 2 j + 1 the upper ones
      a[j][i] = __byte_perm(weights[i / 2 * 2].words[j], weights[i / 2 * 2 + 1].words[j], i % 2 ? 0x7632 : 0x5410);
  // sums that do not wait for one another follow one another
#pragma unroll
  for (int part = 0; part < kParts; part++)
#pragma unroll
    for (int j = 0; j < kPairs; j++)
#pragma unroll
      for (int eight = 0; eight < kTokens / 8; eight++) multiply_add<bfloat16>(sums[eight][j], a[j], z.b[eight][part]);
}

// A warp goes from sixteen rows to the next. As soon as weights have been multiplied, the next ones are asked for
// in their place.
template <bool kWide, int kTokens, class Z, class Done>
__device__ void expand_by_mma(const Expansion<Z, bfloat16>& e, int tile, Done done_with) {
  constexpr int kStep = 16 * kWarps;
  const auto& rows = e.rows;
  const int count = int(rows.rows), column = (tile * e.width + group()) * kPacket<bfloat16>;
  const int left = int(rows.columns) - column;
  const bfloat16* const mine = rows.data + 2 * member() * rows.ld + column;
  TileSums<kTokens> sums = {};
  Packet<bfloat16> weights[kPasses<kTokens>][4];
  const auto wanted_of = [&](auto& z, int first) {
    if (first + 16 > count) cut_off(z, first, count);
    return wanted_rows(z);
  };
  const auto read = [&](int pass, unsigned wanted, int first) {
    constexpr int kColumns = kEight * kPacket<bfloat16>;
    if (pass * kEight + group() >= e.width || pass * kColumns >= left) wanted = 0;
    const bfloat16* const at = mine + first * rows.ld + pass * kColumns;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      weights[pass][r] = {};
      if (wanted >> r & 1) weights[pass][r] = stream<kWide>(at + (r % 2 + r / 2 * 8) * rows.ld, left - pass * kColumns);
    }
  };
  const int begin = 16 * warp();
  auto z = e.z.factors(begin), next = e.z.factors(begin + kStep);
  const unsigned wanted_first = wanted_of(z, begin);
#pragma unroll
  for (int pass = 0; pass < kPasses<kTokens>; pass++) read(pass, wanted_first, begin);
  for (int first = begin; first < count; first += kStep) {
    const unsigned wanted = wanted_of(next, first + kStep);
#pragma unroll
    for (int pass = 0; pass < kPasses<kTokens>; pass++) {
      if (pass * kEight >= e.width) break;
      add_rows(weights[pass], z, sums[pass]);
      read(pass, wanted, first + kStep);
    }
    z = next;
    next = e.z.factors(first + 2 * kStep);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses<kTokens>; pass++)
#pragma unroll
    for (int eight = 0; eight < kTokens / 8; eight++)
      if (pass * kEight < e.width && eight * 8 < e.z.tokens)
        add_warps(sums[pass][eight], pass * kEight, e.width, eight * 8, e.z.tokens, tile, rows.columns, done_with);
}

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
template <int kTokens, class Z, class T>
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
