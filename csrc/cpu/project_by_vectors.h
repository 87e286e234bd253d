// h = B x for a few tokens by vectors: dot products with the rows of B in float32.
//
// The order of a sum does not depend on the number of threads or on the other tokens, so neither do its bits.
#pragma once

#include <type_traits>
#include <vector>

#include "quantized.h"
#include "steps.h"

namespace {

constexpr int kTileTokens = 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 5;  // 20 sums in 32 registers
#else
constexpr int kTileRows = 2;  // 8 in 16
#endif
constexpr int kFewTokens = 2;
constexpr int kRowsOfFew = 4;  // the speed is bound by memory, and four streams are fastest
// The distance of prefetches. On Intel's processors they raise one token from 12 to 14 GB/s. On Zen 4 they halved the
// speed, so builds for AMD (AVX-512 with bfloat16 but without tiles) leave it to the hardware prefetcher.
#if defined(__AMX_BF16__) || (defined(__AVX512F__) && !defined(__AVX512BF16__))
constexpr int64_t kRowAheadBytes = 1024;
#else
constexpr int64_t kRowAheadBytes = 0;
#endif

// Columns of a row of weights in the form that multiply_add takes. For several tokens a quantised row is scaled first.
template <bool kSeveral, class Term, class... Count>
auto weights_of(const Term& term, int64_t k, Count... count) {
  using Operand = decltype(term.operand(k, count...));
  if constexpr (kSeveral && std::is_same_v<Operand, Scaled>) return term.chunk(k, count...);
  else return term.operand(k, count...);
}

// h[m][i · apart] = B[first + i · apart] · x[m] for a tile of kRows rows i and kTokens tokens m; x is [tokens,
// columns].
template <int kRows, int kTokens, class W>
void dot_tile(const W& B, int64_t first, int64_t apart, const typename W::Element* x, float* room, float* h,
              int64_t ldh) {
  const int64_t size = B.columns;
  typename W::Row row[kRows];
  typename W::Term term[kRows];
  for (int r = 0; r < kRows; r++) {
    row[r] = B.at(first + r * apart, 0);
    term[r] = W::term(row[r], 1.0f, size, room + r * W::room(size));
  }
  Vec sums[kTokens][kRows] = {};
  // `count` is the argument of an incomplete chunk, or nothing.
  const auto add = [&](int64_t k, auto load_x, auto... count) {
    decltype(load_x(x)) v[kTokens];
    for (int m = 0; m < kTokens; m++) v[m] = load_x(x + m * size + k);
    for (int r = 0; r < kRows; r++) {
      const auto w = weights_of<(kTokens > kFewTokens)>(term[r], k, count...);
      for (int m = 0; m < kTokens; m++) sums[m][r] = multiply_add(sums[m][r], v[m], w);
    }
  };
  const auto ask = [&](int64_t k) {
    for (int r = 0; r < kRows; r++) ask_for<W>(row[r], k + columns_in<W>(kRowAheadBytes));
  };
  const auto whole = [](const typename W::Element* p) { return load_operand(p); };
  constexpr int64_t kStep = kLineChunks<W> * kChunk;
  int64_t k = 0;
  for (; k + kStep <= size; k += kStep) {
    if (kRowAheadBytes) ask(k);
#pragma GCC unroll 4
    for (int c = 0; c < kLineChunks<W>; c++) add(k + c * kChunk, whole);
  }
  for (; k + kChunk <= size; k += kChunk) add(k, whole);
  if (const int64_t count = size - k; count > 0)
    add(k, [=](const typename W::Element* p) { return load_operand_first(p, count); }, count);
  for (int m = 0; m < kTokens; m++)
    for (int r = 0; r < kRows; r++) h[m * ldh + r * apart] = sum(sums[m][r]);
}

template <class T>
const T* skip_tokens(const T* x, int64_t count, int64_t size) {
  return x + count * size;
}

template <int kRows, class W, class X>
void dot_tokens(const W& B, int64_t first, int64_t apart, X x, int64_t tokens, float* room, float* h, int64_t ldh) {
  int64_t m = 0;
  const auto tile = [&](auto count) {
    dot_tile<kRows, count()>(B, first, apart, skip_tokens(x, m, B.columns), room, h + m * ldh + first, ldh);
    m += count();
  };
  while (m + kTileTokens <= tokens) tile(std::integral_constant<int, kTileTokens>{});
  if (m + 2 <= tokens) tile(std::integral_constant<int, 2>{});
  if (m < tokens) tile(std::integral_constant<int, 1>{});
}

// Reads the rows [begin, end) as kRows streams, each a share of them. The streams are far apart, because the hardware
// prefetcher follows distant rows better than neighbouring ones. All streams use the same loads of x.
template <int kRows, class W, class X>
void dot_streams(const W& B, X x, int64_t tokens, int64_t begin, int64_t end, float* h, int64_t ldh) {
  const int64_t share = (end - begin) / kRows;
  std::vector<float> room(kRows * W::room(B.columns));
  for (int64_t r = begin; r < begin + share; r++) dot_tokens<kRows>(B, r, share, x, tokens, room.data(), h, ldh);
  for (int64_t r = begin + kRows * share; r < end; r++) dot_tokens<1>(B, r, 1, x, tokens, room.data(), h, ldh);
}

// Vectors read x [tokens, size] as it is.
template <class Step>
const Element<Step>* arrange(ByVectors<Step>, const Element<Step>* x, int64_t /*tokens*/, int64_t /*size*/) {
  return x;
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh].
template <class Step, class W>
void project_rows(ByVectors<Step>, const W& B, const typename W::Element* x, int64_t tokens, int64_t begin, int64_t end,
                  float* h, int64_t ldh) {
  if (tokens <= kFewTokens) dot_streams<kRowsOfFew>(B, x, tokens, begin, end, h, ldh);
  else dot_streams<kTileRows>(B, x, tokens, begin, end, h, ldh);
}

}  // namespace
