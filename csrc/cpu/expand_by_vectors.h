// Sums over the live rows for a few tokens, Σ h[r] · row_r, by vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "mask.h"
#include "prefetch.h"

namespace {

constexpr int kTen = 10;         // rows that one token reads side by side
constexpr int kSideBySide = 12;  // rows that several tokens do
#if defined(__AVX512F__)
constexpr int kTokensAtOnce = 8;     // 16 sums, the rows and a value in 32 registers
constexpr int kFewestTenChunks = 2;  // 4 sums and the values of ten rows
#else
constexpr int kTokensAtOnce = 4;
constexpr int kFewestTenChunks = 1;
#endif
// Chunks of a row that one token adds before the next row: at least a line of the caches, as far as there are
// registers for the sums. The values of quantised rows are not in registers.
template <class W>
constexpr int kTenChunks = std::max(kFewestTenChunks, std::min(kLineChunks<W>, 4));

// Where the rows of steps begin, from `column` on, of which `size` columns will be read. Their scales are asked for
// here.
template <class Step, class W>
auto address_in(const Masked<ByVectors<Step>>& h, const W& rows, int64_t column, int64_t size) {
  return [=, &h, &rows](int64_t i) {
    const auto row = rows.at(h.row(i / Step::kRows, i % Step::kRows), column);
    W::ask_for_scales(row, size);
    return W::address(row, 0);
  };
}

// The gaps between live rows that are asked for too: there are none in a part of the columns.
template <class W>
int64_t gaps_of(const W& rows, int64_t size) {
  return size == rows.columns ? kBetweenBytes : 0;
}

// What is asked from memory while `steps` steps from s on are added side by side.
template <class Step, class W>
auto steps_after(const Masked<ByVectors<Step>>& h, const W& rows, int64_t s, int steps, int64_t column, int64_t size) {
  constexpr int kRows = Step::kRows;
  return Ahead(address_in(h, rows, column, size), s * kRows, steps * kRows, h.steps() * kRows, size * W::kBits / 8,
               gaps_of(rows, size));
}

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

// Adds the columns [n, n + kChunks · kChunk) of ten rows. `rest` is the argument of an incomplete chunk, or nothing.
template <int kChunks, class Term, class... Rest>
inline void add_columns(const Term (&term)[kTen], int64_t n, float* sums, Rest... rest) {
  Chunk tile[kChunks];
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) tile[c] = load(sums + n + c * kChunk);
#pragma GCC unroll 16
  for (int i = 0; i < kTen; i++)
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; c++) term[i].add_to(tile[c], n + c * kChunk, rest...);
#pragma GCC unroll 16
  for (int c = 0; c < kChunks; c++) store(sums + n + c * kChunk, tile[c]);
}

// Steps of one token, of which a thread adds some columns.
struct Share {
  int64_t begin, end;
};

// Adds ten rows, from column n on, for one token, whose values stay in registers while the rows pass.
template <class W, class Ahead>
inline void add_ten(const typename W::Row (&row)[kTen], const float (&value)[kTen], int64_t n, int64_t size,
                    float* room, Ahead& ahead, float* sums) {
  constexpr int64_t kStep = kTenChunks<W> * kChunk;
  typename W::Term term[kTen];
  for (int i = 0; i < kTen; i++) term[i] = W::term(row[i], value[i], size, room + i * W::room(size));
  for (; n + kStep <= size; n += kStep) {
    ahead.ask(lines_of<W>(kTen * kStep));
    add_columns<kTenChunks<W>>(term, n, sums);
  }
  for (; n + kChunk <= size; n += kChunk) add_columns<1>(term, n, sums);
  if (n < size) add_columns<1>(term, n, sums, size - n);
}

// What a thread needs to add rows for one token. It is kept from share to share, because allocations show in the
// profile of a step.
template <class W>
struct Scratch {
  LineVector<float> room;
};

// What is asked from memory while tens of steps of one token are added.
template <class W>
auto ahead_of_tens(const Masked<ByVectors<Single<W>>>& h, const W& rows, const Turns<kTen>& turns, int64_t column,
                   int64_t size) {
  return AheadOfTurns(turns, address_in(h, rows, column, size), h.steps(), size * W::kBits / 8, kLiveStreamAheadBytes,
                      gaps_of(rows, size));
}

// Adds most steps of a share, ten at a time, and returns the first step that is still to be added. `column` is the
// first of the `size` columns wanted.
template <class W>
int64_t add_tens(const Masked<ByVectors<Single<W>>>& h, Share share, const W& rows, int64_t column, int64_t size,
                 Scratch<W>& scratch, float* sums) {
  scratch.room.resize(kTen * W::room(size));
  const Turns<kTen> turns(share.begin, share.end);
  auto ahead = ahead_of_tens(h, rows, turns, column, size);
  for (int64_t turn = 0; turn < turns.count; turn++) {
    typename W::Row row[kTen];
    float value[kTen];
    for (int i = 0; i < kTen; i++) {
      const int64_t s = turns.row(turn, i);
      row[i] = rows.at(h.row(s, 0), column), value[i] = h.values[s];
    }
    ahead.begin(turn);
    add_ten<W>(row, value, 0, size, scratch.room.data(), ahead, sums);
  }
  return turns.rest();
}

// Adds groups of kSteps steps from step s on, as long as a whole group is left before step `end`. Returns the first
// step that is still to be added. `column` is the first of the `size` columns wanted.
template <class Step, int kSteps, class W = typename Step::Weights>
int64_t add_groups(const Masked<ByVectors<Step>>& h, int64_t s, int64_t end, const W& rows, int64_t column,
                   int64_t size, float* sums, int64_t lds) {
  constexpr int kRows = Step::kRows;
  LineVector<float> room(kSteps * kRows * W::room(size));
  for (; s + kSteps <= end; s += kSteps) {
    typename W::Term term[kSteps * kRows];
    for (int i = 0; i < kSteps * kRows; i++)
      term[i] = W::term(rows.at(h.row(s + i / kRows, i % kRows), column), 1.0f, size, room.data() + i * W::room(size));
    const auto* values = h.values.data() + s * h.tokens;
    auto ahead = steps_after(h, rows, s, kSteps, column, size);
    int64_t n = 0;
    for (; n + kChunk <= size; n += kChunk) {
      ahead.ask(lines_of<W>(kSteps * kRows * kChunk));
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
  s = add_groups<Step, kSideBySide / Step::kRows>(h, s, end, rows, column, size, sums, lds);
  s = add_groups<Step, 4 / Step::kRows>(h, s, end, rows, column, size, sums, lds);
  add_groups<Step, 1>(h, s, end, rows, column, size, sums, lds);
}

// So many columns of sums, and of the rows that are asked for early, fit the second-level cache.
template <class W>
constexpr int64_t columns_at_once(int64_t tokens) {
  constexpr int64_t kSumBytes = 256 * 1024, kRowBytes = 16 * 1024;
  const int64_t most = std::min<int64_t>(kSumBytes / sizeof(float) / tokens, columns_in<W>(kRowBytes));
  return std::max<int64_t>(most / W::kUnit, 16) * W::kUnit;
}

// Calls done(token, column, sums in lane order) for the columns [begin, end). The speed is bound by the bytes of the
// rows: each row is read front to back, over as many columns as there is room for sums.
template <class Step, class W, class Done>
void sum_rows(const Masked<ByVectors<Step>>& h, const W& rows, int64_t begin, int64_t end, Done done) {
  const int64_t width = std::min(columns_at_once<W>(h.tokens), chunks_of(end - begin) * kChunk);
  const int64_t lds = width + kChunk;  // a multiple of the page would put all tokens into one cache set
  LineVector<float> sums(h.tokens * lds);
  for (int64_t n = begin; n < end; n += width) {
    const int64_t size = std::min(width, end - n);
    std::fill(sums.begin(), sums.end(), 0.0f);
    add_all_groups(h, 0, h.steps(), rows, n, size, sums.data(), lds);
    for (int64_t m = 0; m < h.tokens; m++)
      for (int64_t i = 0; i < size; i += kChunk) done(m, n + i, load(sums.data() + m * lds + i));
  }
}

}  // namespace
