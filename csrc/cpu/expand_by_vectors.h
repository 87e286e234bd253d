// Sums over the live rows for a few tokens, Σ h[r] · row_r, by vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "mask.h"

namespace {

// Rows that several tokens read side by side: enough streams to fill the memory bus, and few enough for the hardware
// prefetcher to follow (16 streams are slower, 24 half as fast).
constexpr int kStreams = 12;
// Rows that one token reads side by side, from distant places.
constexpr int kFarStreams = 10;
#if defined(__AVX512F__)
constexpr int kTokensAtOnce = 8;     // 16 sums, the rows and a value in 32 registers
constexpr int kFewestFarChunks = 2;  // 4 sums and the values of ten streams
#else
constexpr int kTokensAtOnce = 4;
constexpr int kFewestFarChunks = 1;
#endif
// Chunks of a stream that one token adds before the next stream: at least a line of the caches, as far as there are
// registers for the sums. The values of quantised rows are not in registers.
template <class W>
constexpr int kFarChunks = std::max(kFewestFarChunks, std::min(kLineChunks<W>, 4));

// The distances of prefetches. The hardware prefetcher follows a dozen streams only if the loads of a stream are close
// together in time, but the sums of several tokens come between them. It also does not know where a stream continues
// after the end of a row.
constexpr int64_t kAheadBytes = 256;
constexpr int64_t kFarAheadBytes = 1024;

// sums[m][0, kChunk) += Σ values[s][m] · rows(s), for kSteps steps and kTokens tokens.
template <class Step, int kSteps, int kTokens, class Rows>
inline void add_tile(Rows rows, const typename Step::Value* values, int64_t tokens, float* sums, int64_t lds) {
  Chunk tile[kTokens];
  // Loops over the tile are unrolled to keep it in registers. An unrolled loop over the steps would spill the rows.
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

// The same for all tokens, tile by tile. The first tile reads the rows from memory, the others from the cache.
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

// Adds the columns [n, n + kChunks · kChunk) of one row of each stream. ask(i, n, count) prefetches for stream i;
// `rest` is the argument of an incomplete chunk, or nothing.
template <int kChunks, class Term, class Ask, class... Rest>
inline void add_columns(const Term (&term)[kFarStreams], int64_t n, float* sums, Ask ask, Rest... rest) {
  Chunk tile[kChunks];
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) tile[c] = load(sums + n + c * kChunk);
#pragma GCC unroll 16
  for (int i = 0; i < kFarStreams; i++) {
    ask(i, n, kChunks * kChunk);
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; c++) term[i].add_to(tile[c], n + c * kChunk, rest...);
  }
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) store(sums + n + c * kChunk, tile[c]);
}

// Adds one row of each stream for one token, whose values stay in registers while the rows pass. The streams continue
// with the rows `next`.
template <class W, class Row = typename W::Row>
inline void add_rows(const Row (&row)[kFarStreams], const Row (&next)[kFarStreams], const float* h, int64_t size,
                     float* room, float* sums) {
  constexpr int64_t kAhead = columns_in<W>(kFarAheadBytes), kStep = kFarChunks<W> * kChunk;
  typename W::Term term[kFarStreams];
  for (int i = 0; i < kFarStreams; i++) term[i] = W::term(row[i], h[i], size, room + i * W::room(size));
  const auto its_own = [&](int i, int64_t n, int64_t count) { ask_for<W>(row[i], n + kAhead, count); };
  const auto the_next = [&](int i, int64_t n, int64_t count) { ask_for<W>(next[i], n + kAhead - size, count); };
  int64_t n = 0;
  for (; n + kStep <= size - kAhead; n += kStep) add_columns<kFarChunks<W>>(term, n, sums, its_own);
  for (; n + kStep <= size; n += kStep) add_columns<kFarChunks<W>>(term, n, sums, the_next);
  for (; n + kChunk <= size; n += kChunk) add_columns<1>(term, n, sums, the_next);
  if (n < size) add_columns<1>(term, n, sums, the_next, size - n);
}

// Adds most rows of one token. With one token, the order of a sum may depend on its mask, so this reads ten distant
// streams, each a tenth of the live rows. Returns the first step that is still to be added. `column` is the first of
// the `size` columns wanted.
template <class W>
int64_t add_far_rows(const Masked<ByVectors<Single<W>>>& h, const W& rows, int64_t column, int64_t size, float* sums) {
  const int64_t length = h.steps() / kFarStreams;
  std::vector<float> room(kFarStreams * W::room(size));
  for (int64_t s = 0; s < length; s++) {
    typename W::Row row[kFarStreams], next[kFarStreams];
    float value[kFarStreams];
    for (int i = 0; i < kFarStreams; i++) {
      const int64_t step = i * length + s;
      row[i] = rows.at(h.row(step, 0), column);
      next[i] = rows.at(h.row(std::min(step + 1, h.steps() - 1), 0), column);
      value[i] = h.values[step];
    }
    add_rows<W>(row, next, value, size, room.data(), sums);
  }
  return length * kFarStreams;
}

// Adds groups of kSteps steps from step s on, as long as a whole group is left. Returns the first step that is still to
// be added. `column` is the first of the `size` columns wanted.
template <class Step, int kSteps, class W = typename Step::Weights>
int64_t add_groups(const Masked<ByVectors<Step>>& h, int64_t s, const W& rows, int64_t column, int64_t size,
                   float* sums, int64_t lds) {
  constexpr int kRows = Step::kRows;
  constexpr int64_t kAhead = columns_in<W>(kAheadBytes);
  std::vector<float> room(kSteps * kRows * W::room(size));
  for (; s + kSteps <= h.steps(); s += kSteps) {
    typename W::Row row[kSteps * kRows];
    typename W::Term term[kSteps * kRows];
    for (int i = 0; i < kSteps * kRows; i++) {
      row[i] = rows.at(h.row(s + i / kRows, i % kRows), column);
      term[i] = W::term(row[i], 1.0f, size, room.data() + i * W::room(size));
    }
    const auto* values = h.values.data() + s * h.tokens;
    int64_t n = 0;
    for (; n + kChunk <= size; n += kChunk) {
#pragma GCC unroll 16
      for (int i = 0; i < kSteps * kRows; i++) ask_for<W>(row[i], n + kAhead);
      add_chunk<Step, kSteps>([&](int i) { return Step::rows(term + i * kRows, n); }, values, h.tokens, sums + n, lds);
    }
    if (n < size)
      add_chunk<Step, kSteps>([&](int i) { return Step::rows(term + i * kRows, n, size - n); }, values, h.tokens,
                              sums + n, lds);
  }
  return s;
}

// Calls done(token, column, sums in lane order) for the columns [begin, end). The speed is bound by the bytes of the
// rows: each row is read front to back, over as many columns as there is room for sums in the second-level cache.
template <class Step, class W, class Done>
void sum_rows(const Masked<ByVectors<Step>>& h, const W& rows, int64_t begin, int64_t end, Done done) {
  constexpr int64_t kSumBytes = 256 * 1024;
  constexpr int64_t kUnit = W::kUnit;
  const int64_t most = std::max<int64_t>(kSumBytes / sizeof(float) / h.tokens / kUnit, 16) * kUnit;
  const int64_t width = std::min(most, chunks_of(end - begin) * kChunk);
  const int64_t lds = width + kChunk;  // a multiple of the page would put all tokens into one cache set
  std::vector<Chunk> aligned(h.tokens * lds / kChunk);  // a sum across two cache lines costs twice as much
  float* const sums = reinterpret_cast<float*>(aligned.data());
  for (int64_t n = begin; n < end; n += width) {
    const int64_t size = std::min(width, end - n);
    std::fill(aligned.begin(), aligned.end(), Chunk{});
    int64_t s = 0;
    if constexpr (Step::kRows == 1)
      if (h.tokens == 1) s = add_far_rows(h, rows, n, size, sums);
    s = add_groups<Step, kStreams / Step::kRows>(h, s, rows, n, size, sums, lds);
    s = add_groups<Step, 4 / Step::kRows>(h, s, rows, n, size, sums, lds);
    add_groups<Step, 1>(h, s, rows, n, size, sums, lds);
    for (int64_t m = 0; m < h.tokens; m++)
      for (int64_t i = 0; i < size; i += kChunk) done(m, n + i, load(sums + m * lds + i));
  }
}

}  // namespace
