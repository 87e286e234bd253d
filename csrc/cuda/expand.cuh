// Sums over the kept rows, Σ h[r] · row_r: tiles of columns times splits of the rows.
//
// A block works on one tile of one split. Its warps read the same columns of different rows, in float32
// sums of their own; these meet in shared memory, the splits in global memory, both in one fixed order.
#pragma once

#include "masked.cuh"

namespace {

// Columns of a tile: a packet a lane.
template <class T>
constexpr int kTile = kLanes * kPacket<T>;

// (m ⊙ h) rows, rows [R, N], and how it is cut up.
template <class H, class T>
struct Expansion {
  Values<H> h;
  Matrix<T> rows;
  int tiles, splits;
  float* sums;  // [splits, M, N]

  __device__ int items() const { return tiles * splits; }
};

// Tokens whose sums pass through shared memory together.
template <int kTokens>
constexpr int kTokensAtOnce = kTokens == 1 ? 1 : kTokens / 2;

template <class T, int kTokens>
struct WarpSums {
  float at[kWarps<kTokens>][kTokensAtOnce<kTokens>][kTile<T>];
};

// sums[token][column] += the rows of this warp's list, one after the other. `rows` points at the columns of
// this lane.
template <bool kWide, int kTokens, class T>
__device__ void add_rows(const List<kTokens>& list, int count, const T* rows, int64_t ld, int64_t columns,
                         float (&sums)[kTokens][kPacket<T>]) {
  constexpr int kRows = kWide ? 8 : 1;  // loads in flight
  for (int i = 0; i < count; i += kRows) {
    Packet<T> weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (i + r < count) weights[r] = stream<kWide>(rows + list.row[list.entry(i + r)] * ld, columns);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (i + r >= count) break;
#pragma unroll
      for (int m = 0; m < kTokens; m++) {
        const float h = list.value[list.entry(i + r)][m];
#pragma unroll
        for (int c = 0; c < kPacket<T>; c++) sums[m][c] += h * weights[r][c];
      }
    }
  }
}

// Adds up the sums of the warps, and writes those of `tokens` tokens to out [tokens, N].
template <int kTokens, class T>
__device__ void add_warps(const float (&sums)[kTokens][kPacket<T>], int tokens, int tile, int64_t N, float* out) {
  constexpr int kAtOnce = kTokensAtOnce<kTokens>;
  auto& shared = shared_as<WarpSums<T, kTokens>>();
#pragma unroll
  for (int m = 0; m < kTokens; m += kAtOnce) {
    if (m >= tokens) break;
    __syncthreads();  // nobody reads what lies there any more: a list, or the sums of the tokens before
#pragma unroll
    for (int t = 0; t < kAtOnce; t++)
#pragma unroll
      for (int c = 0; c < kPacket<T>; c++) shared.at[warp()][t][lane() * kPacket<T> + c] = sums[m + t][c];
    __syncthreads();
    for (int i = threadIdx.x; i < kAtOnce * kTile<T>; i += kThreads<kTokens>) {
      const int t = i / kTile<T>, c = i % kTile<T>;
      const int64_t n = int64_t(tile) * kTile<T> + c;
      if (m + t >= tokens || n >= N) continue;
      float sum = 0;
      for (int w = 0; w < kWarps<kTokens>; w++) sum += shared.at[w][t][c];
      out[(m + t) * N + n] = sum;
    }
  }
}

// sums[split] = (m ⊙ h) rows over the rows of the split and the columns of the tile, for M tokens.
template <bool kWide, int kTokens, class H, class T>
__device__ void expand_tile(const Expansion<H, T>& e, int M, int tile, int split) {
  const int64_t column = int64_t(tile) * kTile<T> + lane() * kPacket<T>, columns = e.rows.columns - column;
  for (int first = 0; first < M; first += kTokens) {
    const int tokens = M - first < kTokens ? M - first : kTokens;
    if (first > 0) __syncthreads();  // the sums of the tokens before have been added up
    float sums[kTokens][kPacket<T>] = {};
    if constexpr (kTokens == 1) {
      auto& list = shared_as<SharedList>();
      for (int64_t i = 0; i < dealt_rows(e.rows.rows, split, e.splits); i += list.kSize) {
        const int count = list_shared_rows(list, e.h, i, split, e.splits);
        if (columns > 0) add_rows<kWide, 1>(list, count, e.rows.data + column, e.rows.ld, columns, sums);
      }
    } else {
      auto& list = shared_as<List<kTokens>>();
      const int part = split * kWarps<kTokens> + warp(), parts = e.splits * kWarps<kTokens>;
      for (int64_t i = 0; i < dealt_rows(e.rows.rows, part, parts); i += list.kOfWarp) {
        const int count = list_own_rows<kTokens>(list, e.h, first, tokens, i, part, parts);
        if (columns > 0) add_rows<kWide, kTokens>(list, count, e.rows.data + column, e.rows.ld, columns, sums);
        __syncwarp();
      }
    }
    add_warps<kTokens, T>(sums, tokens, tile, e.rows.columns, e.sums + (int64_t(split) * M + first) * e.rows.columns);
  }
}

// The item of that number, of e.items().
template <int kTokens, class H, class T>
__device__ void expand(const Expansion<H, T>& e, int M, int item) {
  if (e.rows.wide) expand_tile<true, kTokens>(e, M, item % e.tiles, item / e.tiles);
  else expand_tile<false, kTokens>(e, M, item % e.tiles, item / e.tiles);
}

// The sum over all splits, of token m at column n.
template <class H, class T>
__device__ float sum_of_splits(const Expansion<H, T>& e, int M, int m, int64_t n) {
  float sum = 0;
  for (int s = 0; s < e.splits; s++) sum += __ldcg(e.sums + (int64_t(s) * M + m) * e.rows.columns + n);
  return sum;
}

// Sets counters to 0; a grid barrier has to follow.
__device__ inline void clear(unsigned* counters, int count) {
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
}

// Counts the blocks that have finished their part of a tile. True, in all threads, for the last of `blocks`:
// it then sees what the others wrote. Shared memory is free for other uses afterwards.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned blocks) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(arrived, 1u) == blocks - 1);
  __threadfence();
  return last;
}

// Calls f(m, n) for M tokens and the columns of a tile that exist.
template <class T, class F>
__device__ void for_tile(int tile, int M, int64_t N, F f) {
  for (int i = threadIdx.x; i < M * kTile<T>; i += blockDim.x) {
    const int64_t n = int64_t(tile) * kTile<T> + i % kTile<T>;
    if (n < N) f(i / kTile<T>, n);
  }
}

// What comes out of an op.
template <class T>
struct Output {
  const T* bias;
  T* y;
  unsigned* arrived;  // [tiles]
};

// Counts a part of a tile as finished. The last one adds up the splits and the bias, and rounds once.
template <class H, class T>
__device__ void finish(const Expansion<H, T>& e, const Output<T>& output, int M, int tile) {
  if (!last_to_arrive(output.arrived + tile, e.splits)) return;
  for_tile<T>(tile, M, e.rows.columns, [&](int m, int64_t n) {
    const float sum = sum_of_splits(e, M, m, n);
    output.y[m * e.rows.columns + n] = T(output.bias ? sum + float(output.bias[n]) : sum);
  });
}

}  // namespace
