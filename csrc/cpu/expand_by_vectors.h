// Sums over the live rows for a few tokens, Σ h[r] · row_r, by vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "mask.h"
#include "prefetch.h"

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

// The distance of prefetches for several tokens. The hardware prefetcher follows a dozen streams only if the loads of a
// stream are close together in time, but the sums of several tokens come between them.
constexpr int64_t kAheadBytes = 256;

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

// Where the ten streams of one token ask memory for rows of `size` columns: so many columns ahead, and if that is
// beyond the end of a row, in the row so many steps later. If rows are shorter than the distance, at the same column.
struct FarAhead {
  int64_t columns, steps;

  FarAhead(int64_t distance, int64_t size) : columns(std::min(distance, size)), steps((distance + size - 1) / size) {}
};

// Steps of one token, of which a thread adds some columns.
struct Share {
  int64_t begin, end;

  int64_t stream_length() const { return (end - begin) / kFarStreams; }
  int64_t step(int stream, int64_t s) const { return begin + stream * stream_length() + s; }
};

// Adds one row of each stream for one token, whose values stay in registers while the rows pass. The streams continue
// with the rows `next`.
template <class W, class Row = typename W::Row>
inline void add_rows(const Row (&row)[kFarStreams], const Row (&next)[kFarStreams], const float* h, int64_t size,
                     int64_t ahead, float* room, float* sums) {
  constexpr int64_t kStep = kFarChunks<W> * kChunk;
  typename W::Term term[kFarStreams];
  for (int i = 0; i < kFarStreams; i++) term[i] = W::term(row[i], h[i], size, room + i * W::room(size));
  const auto its_own = [&](int i, int64_t n, int64_t count) { ask_for<W>(row[i], n + ahead, count); };
  const auto the_next = [&](int i, int64_t n, int64_t count) { ask_for<W>(next[i], n + ahead - size, count); };
  int64_t n = 0;
  for (; n + kStep <= size - ahead; n += kStep) add_columns<kFarChunks<W>>(term, n, sums, its_own);
  for (; n + kStep <= size; n += kStep) add_columns<kFarChunks<W>>(term, n, sums, the_next);
  for (; n + kChunk <= size; n += kChunk) add_columns<1>(term, n, sums, the_next);
  if (n < size) add_columns<1>(term, n, sums, the_next, size - n);
}

// Adds most steps of a share. With one token, the order of a sum may depend on its mask, so this reads ten distant
// streams, each a tenth of the share. Returns the first step that is still to be added. `column` is the first of the
// `size` columns wanted.
template <class W>
int64_t add_far_rows(const Masked<ByVectors<Single<W>>>& h, Share share, const W& rows, int64_t column, int64_t size,
                     float* sums) {
  const FarAhead ahead(columns_in<W>(far_ahead_bytes()), size);
  std::vector<float> room(kFarStreams * W::room(size));
  for (int64_t s = 0; s < share.stream_length(); s++) {
    typename W::Row row[kFarStreams], next[kFarStreams];
    float value[kFarStreams];
    for (int i = 0; i < kFarStreams; i++) {
      const int64_t step = share.step(i, s);
      row[i] = rows.at(h.row(step, 0), column);
      next[i] = rows.at(h.row(std::min(step + ahead.steps, share.end - 1), 0), column);
      value[i] = h.values[step];
    }
    add_rows<W>(row, next, value, size, ahead.columns, room.data(), sums);
  }
  return share.step(kFarStreams, 0);
}

// Adds groups of kSteps steps from step s on, as long as a whole group is left before step `end`. Returns the first
// step that is still to be added. `column` is the first of the `size` columns wanted.
template <class Step, int kSteps, class W = typename Step::Weights>
int64_t add_groups(const Masked<ByVectors<Step>>& h, int64_t s, int64_t end, const W& rows, int64_t column,
                   int64_t size, float* sums, int64_t lds) {
  constexpr int kRows = Step::kRows;
  constexpr int64_t kAhead = columns_in<W>(kAheadBytes);
  std::vector<float> room(kSteps * kRows * W::room(size));
  for (; s + kSteps <= end; s += kSteps) {
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

// The same for groups of all sizes, until all steps before `end` are added.
template <class Step, class W>
void add_all_groups(const Masked<ByVectors<Step>>& h, int64_t s, int64_t end, const W& rows, int64_t column,
                    int64_t size, float* sums, int64_t lds) {
  s = add_groups<Step, kStreams / Step::kRows>(h, s, end, rows, column, size, sums, lds);
  s = add_groups<Step, 4 / Step::kRows>(h, s, end, rows, column, size, sums, lds);
  add_groups<Step, 1>(h, s, end, rows, column, size, sums, lds);
}

// So many columns of sums fit the second-level cache.
template <class W>
constexpr int64_t columns_at_once(int64_t tokens) {
  constexpr int64_t kSumBytes = 256 * 1024;
  return std::max<int64_t>(kSumBytes / sizeof(float) / tokens / W::kUnit, 16) * W::kUnit;
}

// Calls done(token, column, sums in lane order) for the columns [begin, end). The speed is bound by the bytes of the
// rows: each row is read front to back, over as many columns as there is room for sums.
template <class Step, class W, class Done>
void sum_rows(const Masked<ByVectors<Step>>& h, const W& rows, int64_t begin, int64_t end, Done done) {
  const int64_t width = std::min(columns_at_once<W>(h.tokens), chunks_of(end - begin) * kChunk);
  const int64_t lds = width + kChunk;  // a multiple of the page would put all tokens into one cache set
  std::vector<Chunk> aligned(h.tokens * lds / kChunk);  // a sum across two cache lines costs twice as much
  float* const sums = reinterpret_cast<float*>(aligned.data());
  for (int64_t n = begin; n < end; n += width) {
    const int64_t size = std::min(width, end - n);
    std::fill(aligned.begin(), aligned.end(), Chunk{});
    add_all_groups(h, 0, h.steps(), rows, n, size, sums, lds);
    for (int64_t m = 0; m < h.tokens; m++)
      for (int64_t i = 0; i < size; i += kChunk) done(m, n + i, load(sums + m * lds + i));
  }
}

}  // namespace
