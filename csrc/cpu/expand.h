// Decode: sums over the live rows for a few tokens, Σ h[r] · row_r, in the order of the rows.
#pragma once

#include <algorithm>
#include <vector>

#include "masked.h"

namespace {

// Rows of several tokens that are read side by side: enough streams to fill the memory bus, and few enough for
// the hardware prefetcher to follow (16 are slower, 24 half as fast). One token has its own number, and order.
constexpr int kStreams = 12;
constexpr int kFarStreams = 10;
#if defined(__AVX512F__)
constexpr int kTokensAtOnce = 8;  // 16 sums, the rows and a value in 32 registers
constexpr int kFarChunks = 2;     // 4 sums and the values of ten streams
#else
constexpr int kTokensAtOnce = 4;
constexpr int kFarChunks = 1;
#endif

// How far ahead of their use the rows are asked for. The hardware follows a dozen streams only as long as the
// loads of one are close together in time, which the sums of several tokens between them prevent; and it does
// not know where a stream goes on when a row ends.
constexpr int64_t kAheadBytes = 256;
constexpr int64_t kFarAheadBytes = 1024;

// sums[m][0, kChunk) += Σ values[s][m] · rows of step s, for kSteps steps and kTokens tokens.
template <class Step, int kSteps, int kTokens, class Rows>
inline void add_tile(Rows rows, const typename Step::Value* values, int64_t tokens, float* sums, int64_t lds) {
  Chunk tile[kTokens];
  // unrolled loops over the tile keep it in registers; an unrolled one over the steps would spill the rows
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++) tile[m] = load(sums + m * lds);
#pragma GCC unroll 1
  for (int s = 0; s < kSteps; s++) {
    const Chunk w = rows(s);
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; m++) Step::multiply_add(tile[m], values[s * tokens + m], w);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++) store(sums + m * lds, tile[m]);
}

// The same for all tokens. The rows come from memory for the first tile and from the cache for the others.
template <class Step, int kSteps, class Rows>
inline void add_chunk(Rows rows, const typename Step::Value* values, int64_t tokens, float* sums, int64_t lds) {
  int64_t m = 0;
  const auto add = [&](auto count) {
    add_tile<Step, kSteps, count()>(rows, values + m, tokens, sums + m * lds, lds);
    m += count();
  };
  while (m + kTokensAtOnce <= tokens) add(std::integral_constant<int, kTokensAtOnce>{});
  if (kTokensAtOnce > 4 && m + 4 <= tokens) add(std::integral_constant<int, 4>{});
  if (m + 2 <= tokens) add(std::integral_constant<int, 2>{});
  if (m < tokens) add(std::integral_constant<int, 1>{});
}

// Columns [n, n + kChunks · kChunk) of one row of each stream; ask(i, n) asks for what stream i reads later.
template <int kChunks, class T, class Ask, class Load>
inline void add_columns(const T* const (&row)[kFarStreams], const Vec (&value)[kFarStreams], int64_t n, float* sums,
                        Ask ask, Load load_at) {
  Chunk tile[kChunks];
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) tile[c] = load(sums + n + c * kChunk);
#pragma GCC unroll 16
  for (int i = 0; i < kFarStreams; i++)
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; c++) {
      ask(i, n + c * kChunk);
      const Chunk w = load_at(row[i] + n + c * kChunk);
      tile[c].lo += value[i] * w.lo;
      tile[c].hi += value[i] * w.hi;
    }
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) store(sums + n + c * kChunk, tile[c]);
}

// One row of each stream of one token, whose values stay in registers while the rows pass; `next` are the rows
// that the streams go on with.
template <class T>
inline void add_rows(const T* const (&row)[kFarStreams], const T* const (&next)[kFarStreams], const float* h,
                     int64_t size, float* sums) {
  constexpr int64_t kAhead = kFarAheadBytes / sizeof(T), kStep = kFarChunks * kChunk;
  Vec value[kFarStreams];
  for (int i = 0; i < kFarStreams; i++) value[i] = splat(h[i]);
  const auto its_own = [&](int i, int64_t n) { ask_for(row[i] + n + kAhead); };
  const auto the_next = [&](int i, int64_t n) { ask_for(next[i] + n + kAhead - size); };
  const auto whole = [](const T* p) { return load(p); };
  int64_t n = 0;
  for (; n + kStep <= size - kAhead; n += kStep) add_columns<kFarChunks>(row, value, n, sums, its_own, whole);
  for (; n + kStep <= size; n += kStep) add_columns<kFarChunks>(row, value, n, sums, the_next, whole);
  for (; n + kChunk <= size; n += kChunk) add_columns<1>(row, value, n, sums, the_next, whole);
  const auto rest = [count = size - n](const T* p) { return load_first(p, count); };
  if (n < size) add_columns<1>(row, value, n, sums, the_next, rest);
}

// One token: in what order its rows are added is nobody else's business, so they are read as streams that lie
// far apart, each a tenth of the live rows. Returns the step after the last one added.
template <class T>
int64_t add_far_rows(const Masked<Single<T>>& h, const T* rows, int64_t ld, int64_t size, float* sums) {
  const int64_t length = h.steps() / kFarStreams;
  for (int64_t s = 0; s < length; s++) {
    const T *row[kFarStreams], *next[kFarStreams];
    float value[kFarStreams];
    for (int i = 0; i < kFarStreams; i++) {
      const int64_t step = i * length + s;
      row[i] = rows + h.row(step, 0) * ld;
      next[i] = rows + h.row(std::min(step + 1, h.steps() - 1), 0) * ld;
      value[i] = h.values[step];
    }
    add_rows(row, next, value, size, sums);
  }
  return length * kFarStreams;
}

template <class Step>
using Element = typename Step::Element;

// Adds as many groups of kSteps steps as there are, from step s on; returns the next one. `rows` starts at
// the first of the `size` columns wanted.
template <class Step, int kSteps>
int64_t add_groups(const Masked<Step>& h, int64_t s, const Element<Step>* rows, int64_t ld, int64_t size, float* sums,
                   int64_t lds) {
  constexpr int kRows = Step::kRows;
  constexpr int64_t kAhead = kAheadBytes / sizeof(Element<Step>);
  for (; s + kSteps <= h.steps(); s += kSteps) {
    const Element<Step>* row[kSteps * kRows];
    for (int i = 0; i < kSteps * kRows; i++) row[i] = rows + h.row(s + i / kRows, i % kRows) * ld;
    const auto* values = h.values.data() + s * h.tokens;
    int64_t n = 0;
    for (; n + kChunk <= size; n += kChunk) {
#pragma GCC unroll 16
      for (int i = 0; i < kSteps * kRows; i++) ask_for(row[i] + n + kAhead);
      add_chunk<Step, kSteps>([&](int i) { return Step::rows(row + i * kRows, n); }, values, h.tokens, sums + n, lds);
    }
    if (n < size)
      add_chunk<Step, kSteps>([&](int i) { return Step::rows(row + i * kRows, n, size - n); }, values, h.tokens,
                              sums + n, lds);
  }
  return s;
}

// Decode, bound by the bytes of the rows: each is read front to back, as wide as its sums stay in the
// second-level cache. Calls done(token, column, sums in lane order) for the columns [begin, end).
template <class Step, class Done>
void stream_rows(const Masked<Step>& h, const Element<Step>* rows, int64_t ld, int64_t begin, int64_t end, Done done) {
  constexpr int64_t kSumBytes = 256 * 1024;
  const int64_t most = std::max<int64_t>(kSumBytes / sizeof(float) / h.tokens / kChunk, 16) * kChunk;
  const int64_t width = std::min(most, chunks_of(end - begin) * kChunk);
  const int64_t lds = width + kChunk;  // not a multiple of the page: that would put all tokens in one cache set
  std::vector<Chunk> aligned(h.tokens * lds / kChunk);  // a sum across two cache lines costs twice as much
  float* const sums = reinterpret_cast<float*>(aligned.data());
  for (int64_t n = begin; n < end; n += width) {
    const int64_t size = std::min(width, end - n);
    std::fill(aligned.begin(), aligned.end(), Chunk{});
    int64_t s = 0;
    if constexpr (Step::kRows == 1)
      if (h.tokens == 1) s = add_far_rows(h, rows + n, ld, size, sums);
    s = add_groups<Step, kStreams / Step::kRows>(h, s, rows + n, ld, size, sums, lds);
    s = add_groups<Step, 4 / Step::kRows>(h, s, rows + n, ld, size, sums, lds);
    add_groups<Step, 1>(h, s, rows + n, ld, size, sums, lds);
    for (int64_t m = 0; m < h.tokens; m++)
      for (int64_t i = 0; i < size; i += kChunk) done(m, n + i, load(sums + m * lds + i));
  }
}

}  // namespace
