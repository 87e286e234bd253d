// The mask, and the lists of rows that it leaves.
#pragma once

#include "device.cuh"

namespace {

// Keep unless |h|·scale < threshold, decided in float32; a NaN is kept. `scale` may be null, and the
// threshold is one value (step 0) or one a row (step 1).
struct Mask {
  const float* threshold;
  int step;
  const float* scale;

  __device__ bool keeps(float h, int64_t row) const {
    const float score = scale ? fabsf(h) * scale[row] : fabsf(h);
    return !(score < threshold[row * step]);
  }
};

// What is masked: h [tokens, rows] of some type. Values that this launch has written are read past the
// first-level cache, which other multiprocessors' writes do not reach.
template <class H>
struct Values {
  const H* h;
  int64_t ld, rows;
  Mask mask;

  __device__ float value(int m, int64_t row) const {
    if constexpr (sizeof(H) == sizeof(float)) return __ldcg(h + m * ld + row);
    else return float(h[m * ld + row]);
  }
};

// Rows come in runs of neighbours, and the runs are dealt out in turn: ranks are sorted by energy, so that
// every part gets its share of those that are nearly always on. A run of float32 values fills a sector.
constexpr int kRun = 8;

// Row number `i` of part `part` of `parts`; it may lie beyond the last row.
__device__ inline int64_t dealt_row(int64_t i, int64_t part, int64_t parts) {
  return (i / kRun * parts + part) * kRun + i % kRun;
}

// An upper bound of i for the rows of a part.
__device__ inline int64_t dealt_rows(int64_t rows, int64_t part, int64_t parts) {
  const int64_t runs = ceil_div(rows, kRun);
  return part < runs ? ceil_div(runs - part, parts) * kRun : 0;
}

// Kept rows and their values, as many as one pass over the mask can yield.
template <int kTokens>
struct List {
  static constexpr int kSize = kTokens == 4 ? 2048 : 1024;
  static constexpr int kOfWarp = kSize / kWarps<kTokens>;
  int row[kSize];
  float value[kSize][kTokens];

  // Entry i of this warp's.
  __device__ static int entry(int i) { return kTokens == 1 ? i * kWarps<1> + warp() : warp() * kOfWarp + i; }
};

// Several tokens: each warp lists rows of its own, those that at least one of the `tokens` keeps, in order;
// the values of the others are 0. Which warp adds up a row depends on the row alone, so a token's sums have
// the same bits in any company. Returns the number of this warp's entries.
template <int kTokens, class H>
__device__ int list_own_rows(List<kTokens>& list, const Values<H>& values, int first, int tokens, int64_t begin,
                             int64_t part, int64_t parts) {
  int count = 0;
  for (int i = lane(); i < List<kTokens>::kOfWarp; i += kLanes) {
    const int64_t row = dealt_row(begin + i, part, parts);
    float kept[kTokens] = {};
    bool any = false;
    if (row < values.rows) {
#pragma unroll
      for (int m = 0; m < kTokens; m++) {
        if (m >= tokens) break;
        const float h = values.value(first + m, row);
        const bool keep = values.mask.keeps(h, row);
        if (keep) kept[m] = h;
        any |= keep;
      }
    }
    const unsigned ballot = __ballot_sync(kAllLanes, any);
    if (any) {
      const int entry = list.entry(count + lanes_before(ballot));
      list.row[entry] = int(row);
#pragma unroll
      for (int m = 0; m < kTokens; m++) list.value[entry][m] = kept[m];
    }
    count += __popc(ballot);
  }
  __syncwarp();
  return count;
}

constexpr int kPasses = 2;  // of a block's threads over the rows of a list
static_assert(kPasses * kThreads<1> == List<1>::kSize && kPasses * kWarps<1> == kLanes);

struct SharedList : List<1> {
  int counts[kPasses * kWarps<1>];  // kept rows of each pass of each warp
};

// One token: the block lists its kept rows together, in order, and the warps take turns, so that each gets
// as many as any other. Returns the number of this warp's entries.
template <class H>
__device__ int list_shared_rows(SharedList& list, const Values<H>& values, int64_t begin, int64_t part, int64_t parts) {
  float h[kPasses];
  int64_t row[kPasses];
  unsigned ballot[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    row[p] = dealt_row(begin + p * kThreads<1> + threadIdx.x, part, parts);
    h[p] = row[p] < values.rows ? values.value(0, row[p]) : 0.0f;
  }
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    ballot[p] = __ballot_sync(kAllLanes, row[p] < values.rows && values.mask.keeps(h[p], row[p]));
    if (lane() == 0) list.counts[p * kWarps<1> + warp()] = __popc(ballot[p]);
  }
  __syncthreads();  // the counts are there, and no warp reads the list of the round before any more
  const int count = list.counts[lane()], up_to = sum_up_to_lane(count);
#pragma unroll
  for (int p = 0; p < kPasses; p++) {
    const int before = __shfl_sync(kAllLanes, up_to - count, p * kWarps<1> + warp());
    if (ballot[p] >> lane() & 1) {
      const int entry = before + lanes_before(ballot[p]);
      list.row[entry] = int(row[p]);
      list.value[entry][0] = h[p];
    }
  }
  const int total = __shfl_sync(kAllLanes, up_to, kLanes - 1);
  __syncthreads();
  return (total - warp() + kWarps<1> - 1) / kWarps<1>;
}

}  // namespace
