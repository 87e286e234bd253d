// h = B x for a few tokens by vectors: dot products with the rows of B in float32.
//
// The order of a sum does not depend on the number of threads or on the other tokens, so neither do its bits.
#pragma once

#include <type_traits>
#include <vector>

#include "prefetch.h"
#include "quantized.h"
#include "steps.h"

namespace {

constexpr int kTileTokens = 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 5;       // 20 sums in 32 registers
constexpr int kQuantizedRows = 8;  // that one or two tokens read side by side
#else
constexpr int kTileRows = 2;  // 8 in 16
constexpr int kQuantizedRows = 4;
#endif
constexpr int kFewTokens = 2;
constexpr int kRowsOfFew = 4;  // the speed is bound by memory, and four streams are fastest
// How far ahead the rows of float weights are asked for. On Intel's processors it raises one token from 12 to 14 GB/s.
// On Zen 4 it halved the speed, so builds for AMD (AVX-512 with bfloat16 but without tiles) leave it to the hardware.
#if defined(__AMX_BF16__) || (defined(__AVX512F__) && !defined(__AVX512BF16__))
constexpr int64_t kRowAheadBytes = 1024;
#else
constexpr int64_t kRowAheadBytes = 0;
#endif

// Where the rows of B begin, of which more will be asked for. Their scales are asked for here.
template <class W>
auto address_in(const W& B) {
  return [&B](int64_t r) {
    const auto row = B.at(r, 0);
    W::ask_for_scales(row, B.columns);
    return W::address(row, 0);
  };
}

// What is asked from memory while the rows [r, r + count) of B are multiplied: later rows, of those before `end`.
template <class W>
auto rows_after(const W& B, int64_t r, int count, int64_t end) {
  return Ahead(address_in(B), r, count, end, B.columns * W::kBits / 8);
}

// Asks for what lies ahead in kRows rows that are read side by side, from far apart places.
template <int kRows>
class AheadInRows {
 public:
  template <class W>
  AheadInRows(const W& B, int64_t first, int64_t apart) {
    for (int i = 0; i < kRows; i++)
      at_[i] = static_cast<const char*>(W::address(B.at(first + i * apart, 0), 0)) + kRowAheadBytes;
  }
  void ask(int64_t lines) {
    if (!kRowAheadBytes) return;
    for (int64_t line = 0; line < lines; line += kRows)
      for (const char*& at : at_) __builtin_prefetch(at), at += kLineBytes;
  }

 private:
  const char* at_[kRows];
};

// Columns of a row of weights in the form that multiply_add takes. For several tokens a quantised row is scaled first.
template <bool kSeveral, class Term, class... Count>
auto weights_of(const Term& term, int64_t k, Count... count) {
  using Operand = decltype(term.operand(k, count...));
  if constexpr (kSeveral && std::is_same_v<Operand, Scaled>) return term.chunk(k, count...);
  else return term.operand(k, count...);
}

// h[m][i · apart] = B[first + i · apart] · x[m] for a tile of kRows rows i and kTokens tokens m; x is [tokens,
// columns].
template <int kRows, int kTokens, class W, class Ahead>
void dot_tile(const W& B, int64_t first, int64_t apart, const typename W::Element* x, Ahead& ahead, float* room,
              float* h, int64_t ldh) {
  const int64_t size = B.columns;
  typename W::Term term[kRows];
  for (int r = 0; r < kRows; r++) term[r] = W::term(B.at(first + r * apart, 0), 1.0f, size, room + r * W::room(size));
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
  const auto whole = [](const typename W::Element* p) { return load_operand(p); };
  constexpr int64_t kStep = kLineChunks<W> * kChunk;
  int64_t k = 0;
  for (; k + kStep <= size; k += kStep) {
    ahead.ask(lines_of<W>(kRows * kStep));
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

template <int kRows, class W, class X, class Ahead>
void dot_tokens(const W& B, int64_t first, int64_t apart, X x, int64_t tokens, Ahead& ahead, float* room, float* h,
                int64_t ldh) {
  int64_t m = 0;
  const auto tile = [&](auto count) {
    dot_tile<kRows, count()>(B, first, apart, skip_tokens(x, m, B.columns), ahead, room, h + m * ldh + first, ldh);
    m += count();
  };
  while (m + kTileTokens <= tokens) tile(std::integral_constant<int, kTileTokens>{});
  if (m + 2 <= tokens) tile(std::integral_constant<int, 2>{});
  if (m < tokens) tile(std::integral_constant<int, 1>{});
}

// Multiplies the rows [begin, end), kRows at a time: they use the same loads of x. Float weights need little
// arithmetic. They are fastest as streams far apart, because the hardware prefetcher follows each from row to row.
// For quantised rows the processor decides.
template <int kRows, class W, class X>
void dot_rows(const W& B, X x, int64_t tokens, int64_t begin, int64_t end, float* h, int64_t ldh) {
  LineVector<float> room(kRows * W::room(B.columns));
  const Turns<kRows> turns(begin, end, W::kAddressable || rows_lie_far_apart());
  const auto dot = [&](int64_t turn, auto& ahead) {
    dot_tokens<kRows>(B, turns.first(turn), turns.apart(), x, tokens, ahead, room.data(), h, ldh);
  };
  if constexpr (W::kAddressable) {
    for (int64_t turn = 0; turn < turns.count; turn++) {
      AheadInRows<kRows> ahead(B, turns.first(turn), turns.apart());
      dot(turn, ahead);
    }
  } else {
    AheadOfTurns ahead(turns, address_in(B), end, B.columns * W::kBits / 8, kStreamAheadBytes);
    for (int64_t turn = 0; turn < turns.count; turn++) ahead.begin(turn), dot(turn, ahead);
  }
  for (int64_t r = turns.rest(); r < end; r++) {
    auto ahead = rows_after(B, r, 1, end);
    dot_tokens<1>(B, r, 1, x, tokens, ahead, room.data(), h, ldh);
  }
}

// The same for a few tokens.
template <class W, class X>
void dot_rows_of_few(const W& B, X x, int64_t tokens, int64_t begin, int64_t end, float* h, int64_t ldh) {
  if (!W::kAddressable && tokens <= kFewTokens) dot_rows<kQuantizedRows>(B, x, tokens, begin, end, h, ldh);
  else dot_rows<kRowsOfFew>(B, x, tokens, begin, end, h, ldh);
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
  if (tokens <= kFewTokens) dot_rows_of_few(B, x, tokens, begin, end, h, ldh);
  else dot_rows<kTileRows>(B, x, tokens, begin, end, h, ldh);
}

}  // namespace
