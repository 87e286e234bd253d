// How the work is cut up: the method for a number of tokens, blocks of tokens, and the pieces of the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "amx.h"
#include "panels.h"

namespace {

// Up to this many tokens tiles are not used: vectors keep up with memory, and they suffer less than tiles if the other
// thread of the core is busy.
constexpr int64_t kVectorTokens = 4;
// Up to this many tokens quantised weights are multiplied in whole numbers. For more, they are converted once for all.
constexpr int64_t kFixedPointTokens = kHasAmx ? kVectorTokens : 8;
// Up to this many tokens weights are streamed; more tokens take panels. A stream makes pairs of quantised weights again
// for every few tokens, and a panel makes them once.
template <class W>
constexpr int64_t kStreamTokens = W::kAddressable || std::is_same_v<Fastest<W>, Single<W>> ? 32 : kExactTokens;
// Says whether pairs of bfloat16 may be multiplied for so many tokens. Tiles keep all bits of h, vectors round it.
constexpr bool expands_pairs(int64_t tokens) { return tokens > (kHasAmx ? kVectorTokens : kExactTokens); }
// Longer inputs are cut into blocks, so that temporaries do not grow with the input.
constexpr int64_t kBlockTokens = 256;
// A thread gets at least this many weights: waking it for fewer does not pay.
constexpr int64_t kThreadWeights = 32 * 1024;

// Calls f with the method for `tokens` tokens and weights W. The choice depends on the number of tokens alone, because
// the result of a token must not depend on what other tokens keep.
template <class W, class F>
void for_method(int64_t tokens, F f) {
  if constexpr (kUsesAmx<W>)
    if (tokens > kVectorTokens) return f(ByAmx<W>{});
  if (tokens > kStreamTokens<W>) return f(ByPanels<Fastest<W>>{});
  if constexpr (!std::is_same_v<Fastest<W>, Single<W>>)
    if (tokens > kExactTokens) return f(ByVectors<Fastest<W>>{});
  f(ByVectors<Single<W>>{});
}

// Calls f(first, count) for blocks of tokens. A decode step is a single block.
template <class F>
void for_blocks(int64_t tokens, F f) {
  for (int64_t first = 0; first < tokens; first += kBlockTokens) f(first, std::min(kBlockTokens, tokens - first));
}

// Splits [0, items) into one contiguous piece a thread, each of at least kThreadWeights weights.
template <class F>
void parallel(int64_t items, int64_t weights_per_item, F f) {
  const int64_t grain = std::max<int64_t>(1, kThreadWeights / std::max<int64_t>(1, weights_per_item));
  torch::stable::parallel_for(0, items, grain, f);
}

template <class W>
int64_t units_of(int64_t columns) {
  return (columns + W::kUnit - 1) / W::kUnit;
}

// Calls f(begin, end) for one wide slice of the columns a thread. Slices are wide, because short pieces of many rows
// defeat the prefetcher; several tokens split columns, because then nothing has to be reduced afterwards.
template <class W, class F>
void for_column_slices(int64_t columns, int64_t rows, F f) {
  constexpr int64_t kUnit = W::kUnit;
  parallel(units_of<W>(columns), rows * kUnit,
           [&](int64_t begin, int64_t end) { f(begin * kUnit, std::min(end * kUnit, columns)); });
}

}  // namespace
