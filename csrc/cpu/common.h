// From torch's tensors to pointers, and the two halves of an adapter split over threads.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../check.h"
#include "../tensors.h"
#include "expand.h"
#include "expand_tiles.h"
#include "panels.h"
#include "project.h"
#include "project_tiles.h"

namespace {

using rana::data_of;
using rana::empty_output;
using rana::last_size;
using rana::OptionalTensor;
using rana::Packed;
using rana::packed;
using rana::ScalarType;
using rana::Tensor;
using rana::tokens_of;

// Up to this many tokens the masked h stays float32; above it, it is rounded where pairs are faster.
constexpr int64_t kExactTokens = 16;
// Up to this many tokens vectors keep up with memory, and the other thread of a core, if it is busy, slows them down
// less than tiles.
constexpr int64_t kVectorTokens = 4;
// Up to this many tokens weights are streamed; above it they meet the tokens in panels.
constexpr int64_t kStreamTokens = 32;
// Longer inputs are worked off in blocks, so that temporaries do not grow with them.
constexpr int64_t kBlockTokens = 256;
// Weights a thread should have to itself before splitting the work pays for waking it.
constexpr int64_t kThreadWeights = 32 * 1024;

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, ld;

  Matrix(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), rows(t.size(0)), columns(t.size(1)), ld(t.stride(0)) {}
};

// Calls f with a value of the element type of `dtype`, which Check has found to be one of these.
template <class F>
void for_dtype(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) f(float{});
  else if (dtype == ScalarType::BFloat16) f(bfloat16{});
  else f(half{});
}

// Calls f(first, count) for blocks of tokens. All of a decode step is one block.
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

// h = x Bᵀ in float32, [tokens, B.rows].
template <class T>
std::vector<float> project(const T* x, int64_t tokens, Matrix<T> B) {
  std::vector<float> h(tokens * B.rows);
  const auto for_rows = [&](auto f) { parallel(B.rows, B.columns * tokens, f); };
  if constexpr (kHasTiles<T>)
    if (tokens > kVectorTokens) {
      const auto panels = token_blocks(x, tokens, B.columns);
      for_rows([&](int64_t begin, int64_t end) {
        project_tiles(B.data, B.ld, panels.data(), tokens, B.columns, begin, end, h.data(), B.rows);
      });
      return h;
    }
  if (tokens <= kStreamTokens) {
    for_rows([&](int64_t begin, int64_t end) {
      project_rows(B.data, B.ld, x, B.columns, tokens, B.columns, begin, end, h.data(), B.rows);
    });
  } else {
    using Step = typename Fastest<T>::Step;
    const auto panels = token_panels<Step>(x, tokens, B.columns, steps_of<Step>(B.columns));
    for_rows([&](int64_t begin, int64_t end) {
      project_panels<Step>(B.data, B.ld, panels.data(), tokens, B.columns, begin, end, h.data(), B.rows);
    });
  }
  return h;
}

// Calls f with the Step that `tokens` tokens are multiplied in. The choice depends on their number alone:
// a token's result must not depend on what the others keep.
template <class T, class F>
void for_step(int64_t tokens, F f) {
  if constexpr (kHasTiles<T>)
    if (tokens > kVectorTokens) return f(Tiles{});
  if (tokens <= kExactTokens) f(Single<T>{});
  else f(typename Fastest<T>::Step{});
}

// The values of h under the mask, in the order in which sum_rows reads them.
template <class Step>
Masked<Step> masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask) {
  if constexpr (std::is_same_v<Step, Tiles>) return {h, ldh, tokens, ranks, mask, tokens <= kExactTokens ? 3 : 1};
  else return {h, ldh, tokens, ranks, mask, tokens <= kStreamTokens ? tokens : kTile};
}

// Calls done(token, column, chunk of sums in T's lane order) for the columns [begin, end).
template <class Step, class Done>
void sum_rows(const Masked<Step>& h, const Matrix<Element<Step>>& rows, int64_t begin, int64_t end, Done done) {
  if constexpr (std::is_same_v<Step, Tiles>) multiply_tiles(h, rows.data, rows.ld, begin, end, done);
  else if (h.tokens <= kStreamTokens) stream_rows(h, rows.data, rows.ld, begin, end, done);
  else multiply_panels(h, rows.data, rows.ld, begin, end, done);
}

// Calls f(begin, end) for one wide slice of the columns a thread: wide, because short pieces of many
// rows defeat the prefetcher; by column, because then nothing has to be reduced afterwards.
template <class F>
void for_column_slices(int64_t columns, int64_t rows, F f) {
  parallel(chunks_of(columns), rows * kChunk,
           [&](int64_t begin, int64_t end) { f(begin * kChunk, std::min(end * kChunk, columns)); });
}

// A chunk of sums plus the bias of its columns: those from n on, `count` to the end. `bias` may be null.
template <class T>
Chunk add_bias(Chunk sums, const T* bias, int64_t n, int64_t count) {
  const Chunk b = bias ? load_first(bias + n, count) : Chunk{};
  return {sums.lo + b.lo, sums.hi + b.hi};
}

// Adds the bias to finished sums and rounds them into y [tokens, columns].
template <class T>
struct Output {
  T* y;
  int64_t columns;
  const T* bias;

  void operator()(int64_t m, int64_t n, Chunk sums) const {
    store_first(y + m * columns + n, add_bias(sums, bias, n, columns - n), columns - n);
  }
};

// y = (m ⊙ h) rows + bias
template <class T>
void expand(const float* h, int64_t ldh, int64_t tokens, Matrix<T> rows, Mask mask, Output<T> output) {
  for_step<T>(tokens, [&](auto step) {
    const auto live = masked<decltype(step)>(h, ldh, tokens, rows.rows, mask);
    for_column_slices(rows.columns, rows.rows * tokens,
                      [&](int64_t begin, int64_t end) { sum_rows(live, rows, begin, end, output); });
  });
}

}  // namespace
